"""A server with the hub's interface, as far as its client uses it for one model."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse

COMMIT = "c0ffee" + 34 * "0"


@contextmanager
def hub(folder: Path, hub_id: str = "owner/model") -> Iterator[tuple[str, list[str]]]:
    """Yield the server's address and the list of the files that it was asked for."""
    asked: list[str] = []

    def sibling(path: Path) -> dict[str, object]:
        data = path.read_bytes()
        known: dict[str, object] = {
            "rfilename": path.name,
            "size": len(data),
            "blobId": hashlib.sha256(data).hexdigest()[:40],
        }
        if path.suffix in (".safetensors", ".gguf"):
            known["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return known

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self._answer(with_body=False)

        def do_GET(self):
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            path = urlparse(self.path).path
            headers = {"X-Repo-Commit": COMMIT}
            if path.startswith(f"/api/models/{hub_id}"):
                siblings = [sibling(file) for file in sorted(folder.iterdir())]
                if "/tree/" in path:
                    body = json.dumps(
                        [
                            {"type": "file", "path": each["rfilename"], "size": each["size"], "oid": each["blobId"]}
                            for each in siblings
                        ]
                    ).encode()
                else:
                    body = json.dumps({"id": hub_id, "modelId": hub_id, "sha": COMMIT, "siblings": siblings}).encode()
                headers["Content-Type"] = "application/json"
            elif path.startswith(f"/{hub_id}/resolve/") and (folder / path.rpartition("/")[2]).exists():
                file = folder / path.rpartition("/")[2]
                body = file.read_bytes()
                headers["ETag"] = f'"{hashlib.sha256(body).hexdigest()}"'
                headers["Accept-Ranges"] = "bytes"
                if with_body:
                    asked.append(file.name)
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *_args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
