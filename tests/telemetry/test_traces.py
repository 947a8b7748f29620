"""OpenTelemetry traces, as a collector gets them from a real `dsd up`, and where there is none."""

import socket
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from upswarm import dsd_up

from dsd_p2p.errors import ConfigError
from dsd_p2p.telemetry.events import Replayed, SessionEnded, SessionStarted, StageOf, WindowVerified
from dsd_p2p.telemetry.traces import Traces, export_to
from node.watch.outlets import check_collector

pytestmark = pytest.mark.xdist_group("gateway")


@contextmanager
def collector():
    """Yield its URL and the spans it was sent, as (service instance, span)."""
    spans = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            assert self.path == "/v1/traces"
            request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
            for resource in request.resource_spans:
                names = {each.key: each.value.string_value for each in resource.resource.attributes}
                for scope in resource.scope_spans:
                    spans.extend((names["service.instance.id"], span) for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", spans
    finally:
        server.shutdown()
        server.server_close()


def attributes(span):
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


def named(spans, name):
    return [span for _, span in spans if span.name == name]


def test_a_request_is_a_trace_with_its_windows():
    with collector() as (url, spans), dsd_up("--stages", "2", "--mqtt", "none", "--otlp", url) as up:
        asked = {"model": "smollm2-135m", "prompt": "The sea is", "max_tokens": 24, "temperature": 0}
        usage = httpx.post(f"{up.url}/v1/completions", json=asked, timeout=60).json()["usage"]
        deadline = time.monotonic() + 20
        while not named(spans, "generate") and time.monotonic() < deadline:
            time.sleep(0.1)
        (request,) = named(spans, "generate")
        told = attributes(request)
        assert told["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
        assert told["gen_ai.usage.output_tokens"] == usage["completion_tokens"] == 24
        assert len(told["dsd.stages"].values) == 2
        assert {instance for instance, _ in spans} == {told["dsd.coordinator"]}
        windows = named(spans, "window")
        assert windows
        for window in windows:
            assert (window.trace_id, window.parent_span_id) == (request.trace_id, request.span_id)
            assert request.start_time_unix_nano <= window.end_time_unix_nano <= request.end_time_unix_nano
        assert "The sea" not in str(spans), "no text leaves with them"


def test_failovers_errors_and_what_never_ended():
    with collector() as (url, spans):
        traces = Traces(export_to(url), "me", "1")
        stages = (StageOf(peer="a", first=0, last=4), StageOf(peer="b", first=4, last=8))
        for name in ("lost", "cut off"):
            traces.tell(SessionStarted(at_s=100.0, session=name, coordinator="me", stages=stages))
        traces.tell(Replayed(at_s=101.0, session="lost", stages=stages[:1], num_tokens=7))
        traces.tell(WindowVerified(at_s=102.0, session="lost", traversal_s=0.25, stage_us=(5, 6)))
        traces.tell(SessionEnded(at_s=103.0, session="lost", reason="error", error="no chain", num_tokens=9))
        traces.tell(SessionEnded(at_s=103.0, session="never begun"))
        traces.tell(WindowVerified(at_s=103.0, session="never begun"))
        traces.end()
        traces.close()
    assert len(named(spans, "generate")) == 2
    (lost,) = [span for span in named(spans, "generate") if span.events]
    assert lost.status.message == "no chain"
    assert (lost.start_time_unix_nano, lost.end_time_unix_nano) == (100 * 10**9, 103 * 10**9)
    (replay,) = lost.events
    assert replay.name == "replay"
    (window,) = named(spans, "window")
    assert window.end_time_unix_nano - window.start_time_unix_nano == 250_000_000


@pytest.mark.parametrize("kind", ["gone", "silent"])
def test_a_collector_that_does_not_answer_holds_nobody_up(kind):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if kind == "silent":
            listener.listen(8)
        traces = Traces(export_to(f"http://127.0.0.1:{listener.getsockname()[1]}"), "me", "1")
        started_at = time.monotonic()
        for number in range(3000):
            traces.tell(SessionStarted(at_s=1.0, session=str(number)))
            traces.tell(SessionEnded(at_s=2.0, session=str(number)))
        assert len(traces._open) == 0
        traces.close()
        # Far beyond what it should take, and far below what a collector could make it wait.
        assert time.monotonic() - started_at < 20


def test_what_is_no_collector_is_said_at_once(monkeypatch):
    check_collector("")
    check_collector("https://collector.example:4318")
    for url in ("collector:4318", "mqtt://host", "http://", "x", "http://[x"):
        with pytest.raises(ConfigError, match="--otlp"):
            check_collector(url)
    monkeypatch.delitem(sys.modules, "dsd_p2p.telemetry.traces")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match="extra"):
        check_collector("http://127.0.0.1:4318")
