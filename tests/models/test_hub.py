"""Models of the hub, from a server with its interface: fetched once, used without a network, named by their content."""

import os
import shutil
import subprocess
import sys

import gguf
import pytest
from gguf_writing import write_gguf
from hub_server import COMMIT, hub
from safetensors.torch import load_file, save_file

from dsd_p2p.models.progress import NoProgress
from dsd_p2p.models.source import find_model

PROGRAM = """
import sys
from dsd_p2p.models.open import open_span
from dsd_p2p.models.source import find_model, pull_model
from dsd_p2p.types import Span
class Tell:
    def step(self, what, done, total): print(what)
name = sys.argv.pop() if ":Q" in sys.argv[-1] else "owner/model"
source = (pull_model if sys.argv[1] == "pull" else find_model)(name, Tell())
for span in sys.argv[2:]:
    open_span(source, Span(*map(int, span.split(":"))))
print(source.digest())
"""


@pytest.fixture
def model(tiny, tmp_path):
    """The tiny model in two files, one for each half."""
    import json

    folder = tmp_path / "model"
    shutil.copytree(tiny("llama"), folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: "b.safetensors" if ".2." in name or ".3." in name else "a.safetensors" for name in weights}
    for file in set(files.values()):
        part = {name: tensor for name, tensor in weights.items() if files[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def run(tmp_path, endpoint, *words, code=0, **variables):
    environment = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        **variables,
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, done.stderr[-2000:]
    return done.stdout if code == 0 else done.stderr


def test_a_model_is_fetched_by_file_and_then_used_without_a_network(model, tmp_path):
    digest = find_model(str(model), NoProgress()).digest()
    with hub(model) as (endpoint, asked):
        output = run(tmp_path, endpoint, "find", "2:3")
        assert output.splitlines()[-1] == digest, "the digest of the same files in a folder"
        assert {name for name in asked if name.endswith(".safetensors")} == {"b.safetensors"}
        asked.clear()
        assert COMMIT[:12] in run(tmp_path, endpoint, "find", "2:3")
        assert asked == []
    # Nobody listens any more; a proxy that leads nowhere is as good.
    for variables in (
        {"HF_HUB_OFFLINE": "1"},
        {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"},
    ):
        output = run(tmp_path, endpoint, "find", "2:3", **variables)
        assert f"use owner/model at its commit {COMMIT[:12]}" in output
        assert output.splitlines()[-1] == digest
    said = run(tmp_path, endpoint, "find", "0:1", code=1, HF_HUB_OFFLINE="1")
    assert "ModelError: owner/model: it is not in the cache, and the Hugging Face hub does not give it" in said


def test_a_commit_of_another_readme_has_the_same_digest(model, tmp_path):
    with hub(model) as (endpoint, _):
        first = run(tmp_path, endpoint, "find").splitlines()[-1]
        (model / "README.md").write_text("news")
        assert run(tmp_path, endpoint, "pull").splitlines()[-1] == first


def test_pulling_fetches_a_span_or_everything_with_a_line_for_each_file(model, tmp_path):
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    with hub(model) as (endpoint, asked):
        environment |= {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}

        def pull(*flags):
            command = [sys.executable, "-m", "node.cli", "models", "pull", "owner/model", *flags]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
            return done.stderr.splitlines()

        lines = pull("--span", "2:3")
        assert [line for line in lines if "fetch" in line] == ["fetch owner/model 1/1: 0 of 0 MB"]
        assert {name for name in asked if name.endswith(".safetensors")} == {"b.safetensors"}
        lines = pull()
        assert {name for name in asked if name.endswith(".safetensors")} == {"a.safetensors", "b.safetensors"}
        assert lines[-1] == "owner/model is ready"
        assert len(lines) < 10


def test_a_gguf_file_is_named_by_its_format(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for kind in ("Q4_0", "Q8_0"):
        write_gguf(folder / f"tiny-{kind}.gguf", "llama", gguf.GGMLQuantizationType[kind])
    (folder / "README.md").write_text("two files")
    with hub(folder) as (endpoint, asked):
        output = run(tmp_path, endpoint, "find", "0:1", "owner/model:Q4_0")
        assert [name for name in asked if name.endswith(".gguf")] == ["tiny-Q4_0.gguf"]
        assert output.splitlines()[-1] == find_model(str(folder / "tiny-Q4_0.gguf"), NoProgress()).digest()
        said = run(tmp_path, endpoint, "find", "owner/model:Q5_K", code=1)
        assert "no GGUF file of format Q5_K; its GGUF files: tiny-Q4_0.gguf, tiny-Q8_0.gguf" in said
