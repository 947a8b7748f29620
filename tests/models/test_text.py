"""A model's text: pieces joined are the whole text, every file's stop tokens count, templates may fail."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dsd_p2p.errors import ConfigError, ModelError
from dsd_p2p.models.streamer import TextStreamer, decode
from dsd_p2p.models.text import TextCodec
from dsd_p2p.types import Sampling

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
BYTES = [f"<0x{number:02X}>" for number in range(256)]
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'pirate' %}{{ raise_exception('no pirates') }}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    names = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<pad>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = TEMPLATE
    return fast


def byte_level() -> PreTrainedTokenizerFast:
    names = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return wrap(tokenizer)


def byte_fallback(*, strips: bool) -> PreTrainedTokenizerFast:
    """As Llama 2, Mistral and Gemma: pieces, and bytes for what has none; `strips` is SentencePiece's first space."""
    names = dict.fromkeys([*SPECIAL, *BYTES, "▁", "▁a", "a", "»", "—", "e", "."])
    model = models.BPE({name: index for index, name in enumerate(names)}, [], byte_fallback=True, unk_token=SPECIAL[1])
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    last = [decoders.Strip(content=" ", left=1, right=0)] if strips else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last])
    return wrap(tokenizer)


TOKENIZERS = {
    "byte-level": byte_level(),
    "byte-fallback": byte_fallback(strips=False),
    "sentencepiece": byte_fallback(strips=True),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_pieces_joined_are_the_text_of_all_tokens(name, data):
    tokenizer = TOKENIZERS[name]
    size = len(tokenizer)
    # Mostly tokens around characters of several bytes, which is where pieces went wrong.
    likely = [5 + byte for byte in (0x20, 0xE2, 0x80, 0x94, 0xF0, 0x9F, 0x61)] + [0, 4, *range(size - 7, size)]
    tokens = data.draw(st.lists(st.sampled_from(likely) | st.integers(0, size - 1), max_size=200))
    streamer = TextStreamer(tokenizer)
    shown = ""
    for token in tokens:
        shown += streamer.step(token)
        assert not shown.endswith("\N{REPLACEMENT CHARACTER}")
    assert shown + streamer.finish() == decode(tokenizer, tokens)


def test_bytes_that_form_no_character_do_not_end_the_answer():
    """An exception before: "invalid prefix"."""
    tokenizer = TOKENIZERS["byte-fallback"]
    tokens = tokenizer.convert_tokens_to_ids(["a", "<0x20>", "<0xE2>", "<0x80>", "»"])
    streamer = TextStreamer(tokenizer)
    assert [streamer.step(token) for token in tokens] == ["a", "", "", "", "\N{REPLACEMENT CHARACTER}" * 3 + "»"]


@pytest.fixture
def folder(tmp_path):
    TOKENIZERS["byte-level"].save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2}))
    return tmp_path


def test_stop_tokens_are_the_union_of_what_the_files_say(folder):
    """The tokenizer ends a turn with 4; a checkpoint whose other files name only 2 went on with the user's turn."""
    assert TextCodec(folder).stop_tokens == (2, 4)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], "do_sample": True}))
    assert TextCodec(folder).stop_tokens == (2, 3, 4)
    (folder / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": 1}}))
    assert TextCodec(folder).stop_tokens == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("settings", "sampling"),
    [
        ({}, Sampling(temperature=0.7, top_p=0.95)),
        ({"do_sample": False}, Sampling()),
        ({"temperature": 0.6, "top_p": 0.9, "top_k": 20}, Sampling(temperature=0.6, top_p=0.9, top_k=20)),
        ({"do_sample": True, "top_p": 0.8}, Sampling(temperature=1.0, top_p=0.8)),
    ],
)
def test_the_usual_way_to_sample_is_the_models_own(folder, settings, sampling):
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert TextCodec(folder).sampling == sampling


def test_a_broken_settings_file_is_named(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": "two"}')
    with pytest.raises(ModelError, match=r"generation_config\.json: Expected `int | array | null`"):
        TextCodec(folder)


def test_a_tokenizer_that_cannot_be_loaded_is_explained_when_it_is_needed(folder):
    (folder / "tokenizer.json").write_text("{}")
    codec = TextCodec(folder)
    assert codec.decode([5]) == ""
    with pytest.raises(ModelError, match=r"no tokenizer: .* cannot load its files"):
        codec.encode("hello", is_raw=True)


def test_what_the_template_refuses_is_the_askers_mistake(folder):
    codec = TextCodec(folder)
    with pytest.raises(ConfigError, match="no pirates"):
        codec.encode_chat([{"role": "pirate", "content": "arr"}])
    with pytest.raises(ConfigError, match="chat_template cannot be set"):
        codec.encode_chat([{"role": "user", "content": "hi"}], {"chat_template": "{{ 1 }}"})


def test_a_template_that_knows_no_tools_gets_the_calls_as_text(folder):
    codec = TextCodec(folder)
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    with_calls = codec.encode_chat([{"role": "assistant", "content": "", "tool_calls": [call]}])
    assert '{"name": "weather", "arguments": {"city": "Rome"}}' in codec.decode(with_calls)
