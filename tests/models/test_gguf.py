"""GGUF files: read as transformers reads them, split without conversion, kept in their 4 bits where asked."""

import random
import shutil
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from gguf_writing import CONFIGS, MOE, NUM_LAYERS, VOCAB, write_gguf
from lean_text import Text
from transformers import AutoModelForCausalLM

from dsd_p2p.errors import ConfigError, ModelError
from dsd_p2p.models.cache_dir import default_cache_dir
from dsd_p2p.models.catalog import CATALOG
from dsd_p2p.models.checkpoints.gguf_groups import groups_of
from dsd_p2p.models.formats import choose_format
from dsd_p2p.models.loader import load_whole
from dsd_p2p.models.open import open_span
from dsd_p2p.models.progress import NoProgress
from dsd_p2p.models.source import find_model
from dsd_p2p.types import Span

Kind = gguf.GGMLQuantizationType
KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "MXFP4", "BF16", "F16", "F32")
HAS_4_BITS = ("Q4_0", "Q4_1", "Q4_K")
WHOLE = Span(0, NUM_LAYERS)
TOKENS = [random.Random(5).randrange(VOCAB) for _ in range(30)]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "gguf-cache"))


def logits(source, dtype, *spans):
    chain = [open_span(source, span, dtype=dtype) for span in spans or [WHOLE]]
    return Text(chain).run(range(30), [None, *range(29)], range(30), TOKENS)


def as_transformers_reads(path):
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model, model(torch.tensor([TOKENS])).logits[0].numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_logits_of_its_dequantised_weights(kind, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", "llama", Kind[kind])
    source = find_model(str(path), NoProgress())
    reference, expected = as_transformers_reads(path)
    for name, weight in load_whole(source, torch.float32).state_dict().items():
        assert torch.equal(weight, reference.state_dict()[name]), name
    found = logits(source, "float32")
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    stored, rounded = open_span(source, WHOLE, dtype="stored"), open_span(source, WHOLE, dtype="int8")
    near = logits(source, "stored")
    assert np.abs(near - expected).max() < 0.05 * np.abs(expected).max()
    assert (stored.weight_bytes < 0.8 * rounded.weight_bytes) == (kind in HAS_4_BITS)
    is_float = kind in ("F32", "F16", "BF16")
    assert choose_format(source, "cpu", 1 << 40) == ("float32" if is_float else "stored")
    assert choose_format(source, "cuda", 1 << 40) == "float32"


@pytest.mark.parametrize("family", CONFIGS)
def test_families_are_split_without_a_conversion(family, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", family, Kind.Q8_0)
    source = find_model(str(path), NoProgress())
    _, expected = as_transformers_reads(path)
    whole = logits(source, "float32")
    np.testing.assert_allclose(whole, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert np.array_equal(whole, logits(source, "float32", Span(0, 1), Span(1, 2)))
    assert np.array_equal(logits(source, "stored"), logits(source, "stored", Span(0, 1), Span(1, 2)))
    written = [each for each in default_cache_dir().rglob("*") if each.is_file()]
    assert not [each for each in written if each.suffix in (".safetensors", ".gguf")], "nothing is converted on disk"


def test_experts_are_fused_as_transformers_fuses_them(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", MOE, Kind.Q8_0)
    source = find_model(str(path), NoProgress())
    reference, expected = as_transformers_reads(path)
    for name, weight in load_whole(source, torch.float32).state_dict().items():
        assert torch.equal(weight, reference.state_dict()[name]), name
    found = logits(source, "float32", Span(0, 1), Span(1, 2))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert choose_format(source, "cpu", 1 << 40) == "float32"


@pytest.mark.parametrize("kind", HAS_4_BITS)
def test_4_bit_numbers_are_those_of_the_file(kind):
    rng = np.random.default_rng(1)
    _, block_bytes = gguf.GGML_QUANT_SIZES[Kind[kind]]
    num_bytes = 1024 // gguf.GGML_QUANT_SIZES[Kind[kind]][0] * block_bytes
    raw = rng.integers(0, 256, (40, num_bytes), dtype=np.uint8)
    raw.reshape(-1, block_bytes)[:, :4] = (
        rng.uniform(-0.1, 0.1, (raw.size // block_bytes, 2)).astype(np.float16).view(np.uint8)
    )
    groups = groups_of(Kind[kind], raw)
    assert torch.equal(groups.floats(), torch.from_numpy(gguf.dequantize(raw, Kind[kind])))
    assert groups.numbers.max() <= 15


def test_a_row_of_the_embedding_is_read_alone(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", "gemma3", Kind.Q6_K)
    source = find_model(str(path), NoProgress())
    rows = source.weights.rows("model.embed_tokens.weight")
    whole = load_whole(source, torch.float32).state_dict()["model.embed_tokens.weight"]
    wanted = torch.tensor([3, 0, 159, 3])
    assert torch.equal(rows(wanted), whole[wanted])
    assert source.weights.rows("model.norm.weight") is None
    assert open_span(source, Span(0, 1), dtype="stored").ends.num_bytes == 0


def test_a_changed_file_is_noticed_and_the_digest_names_the_content(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", "llama", Kind.Q4_0)
    source = find_model(str(path), NoProgress())
    copy = shutil.copy(path, tmp_path / "other.gguf")
    assert find_model(str(copy), NoProgress()).digest() == source.digest()
    other = write_gguf(tmp_path / "third.gguf", "llama", Kind.Q4_0, seed=1)
    assert find_model(str(other), NoProgress()).digest() != source.digest()
    open_span(source, WHOLE)
    data = bytearray(path.read_bytes())
    data[-100] ^= 255
    path.write_bytes(data)
    with pytest.raises(ModelError, match="has changed on disk"):
        open_span(source, WHOLE)


def test_a_folder_with_one_file_is_that_file(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", "llama", Kind.Q4_0)
    assert find_model(str(tmp_path), NoProgress()).path.name == "tiny.gguf"
    shutil.copy(tmp_path / "tiny.gguf", tmp_path / "second.gguf")
    with pytest.raises(ModelError, match="only GGUF files: name one of them"):
        find_model(str(tmp_path), NoProgress())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GGUF but not really", "it cannot be read as a GGUF model"),
        (b"", "it cannot be read as a GGUF model"),
    ],
)
def test_a_broken_file_is_named(tmp_path, data, reason):
    path = tmp_path / "broken.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=reason):
        find_model(str(path), NoProgress())
    with pytest.raises(ConfigError, match="give a folder, a GGUF file"):
        find_model(str(tmp_path / "missing.gguf"), NoProgress())


def test_a_part_that_is_missing_is_named(tmp_path):
    write_gguf(tmp_path / "tiny-00001-of-00002.gguf", "llama", Kind.Q4_0)
    with pytest.raises(ModelError, match=r"tiny-00002-of-00002.gguf is missing"):
        find_model(str(tmp_path / "tiny-00001-of-00002.gguf"), NoProgress())


def test_positions_that_are_scaled_are_refused(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", "qwen2", Kind.Q4_0, rope__scaling__type="yarn", rope__scaling__factor=4.0)
    with pytest.raises(ModelError, match=r"scales its positions \(yarn\)"):
        find_model(str(path), NoProgress())


def test_a_catalog_model_runs_in_int8_only_if_that_was_judged_good(smollm, monkeypatch):
    assert choose_format(smollm, "cpu", 1 << 40) == "stored"
    judged = replace(CATALOG["smollm2-135m"], int8_agreement=0.96)
    monkeypatch.setitem(CATALOG, "smollm2-135m", judged)
    assert choose_format(smollm, "cpu", 1 << 40) == "int8"
    assert choose_format(smollm, "cpu", 100 << 20) == "stored"


def test_the_default_model_is_read_as_transformers_reads_it(smollm):
    """The whole file, its tokenizer and its chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm.path.parent, gguf_file=smollm.path.name)
    ours = AutoTokenizer.from_pretrained(smollm.folder)
    text = "The quick brown fox — jumps; über 12 dogs.\n\n  def f(x): return x"
    assert ours(text)["input_ids"] == tokenizer(text)["input_ids"]
    turn = [{"role": "user", "content": "Hi"}]
    assert ours.apply_chat_template(turn, tokenize=False) == tokenizer.apply_chat_template(turn, tokenize=False)
    reference = AutoModelForCausalLM.from_pretrained(
        smollm.path.parent, gguf_file=smollm.path.name, dtype=torch.float32
    ).state_dict()
    found = load_whole(smollm, torch.float32).state_dict()
    assert found.keys() == reference.keys()
    assert all(torch.equal(found[name], reference[name]) for name in found)
