"""Makes an OpenTelemetry trace of each request, from the same events that other sinks get."""

import threading
from collections import OrderedDict
from collections.abc import Mapping

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.util.types import AttributeValue

from dsd_p2p.telemetry.events import Event, Replayed, SessionEnded, SessionStarted, StageOf, WindowVerified

_MAX_OPEN = 4096
_EXPORT_TIMEOUT_S = 5.0


class Traces:
    """A sink that makes traces of events. Spans wait in a bounded queue of the SDK's thread; a full queue drops them.

    exporter: where spans go. peer: this peer, as the service's instance id. Attributes have OpenTelemetry's names for
    generative AI where such exist, else names in `dsd.`.
    """

    def __init__(self, exporter: SpanExporter, peer: str, version: str) -> None:
        resource = Resource.create({"service.name": "dsd-p2p", "service.version": version, "service.instance.id": peer})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1000))
        self._tracer: Tracer = self._provider.get_tracer("dsd_p2p", version)
        self._open: OrderedDict[str, Span] = OrderedDict()

    def tell(self, event: Event) -> None:
        """Add one of our own events."""
        match event:
            case SessionStarted():
                self._start(event)
            case WindowVerified() if (span := self._open.get(event.session)) is not None:
                self._window(span, event)
            case Replayed() if (span := self._open.get(event.session)) is not None:
                attributes: Mapping[str, AttributeValue] = {
                    "dsd.stages": _chain(event.stages),
                    "dsd.num_tokens": event.num_tokens,
                }
                span.add_event("replay", attributes, _nanoseconds(event.at_s))
            case SessionEnded() if (span := self._open.pop(event.session, None)) is not None:
                _end(span, event)
            case _:
                pass

    def end(self) -> None:
        """End all open traces."""
        spans, self._open = self._open, OrderedDict()
        for span in spans.values():
            span.end()

    def close(self) -> None:
        """Send the waiting spans, within five seconds. Blocks, so call it in a worker thread."""
        # The SDK itself waits as long as an unresponsive collector makes it.
        last_try = threading.Thread(target=self._provider.shutdown, daemon=True)
        last_try.start()
        last_try.join(_EXPORT_TIMEOUT_S)

    def _start(self, event: SessionStarted) -> None:
        attributes: Mapping[str, AttributeValue] = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.usage.input_tokens": event.num_prompt_tokens,
            "gen_ai.request.max_tokens": event.max_tokens,
            "dsd.session": event.session,
            "dsd.coordinator": event.coordinator,
            "dsd.drafter": event.drafter,
            "dsd.verification": event.verification,
            "dsd.stages": _chain(event.stages),
        }
        self._open[event.session] = self._tracer.start_span(
            "generate", kind=SpanKind.INTERNAL, attributes=attributes, start_time=_nanoseconds(event.at_s)
        )
        if len(self._open) > _MAX_OPEN:
            self._open.popitem(last=False)[1].end()

    def _window(self, request: Span, event: WindowVerified) -> None:
        attributes: Mapping[str, AttributeValue] = {
            "dsd.mode": event.mode,
            "dsd.decision": event.decision,
            "dsd.reason": event.reason,
            "dsd.num_tokens": event.num_tokens,
            "dsd.num_windows": event.num_windows,
            "dsd.num_misses": event.num_misses,
            "dsd.num_stale": event.num_stale,
            "dsd.num_in_flight": event.num_in_flight,
            "dsd.stage_us": event.stage_us,
        }
        span = self._tracer.start_span(
            "window",
            set_span_in_context(request),
            attributes=attributes,
            start_time=_nanoseconds(max(0.0, event.at_s - event.traversal_s)),
        )
        span.end(_nanoseconds(event.at_s))


def export_to(url: str) -> SpanExporter:
    """Return an exporter to a collector, by OTLP over HTTP. url: the collector's base URL, like http://127.0.0.1:4318.

    OpenTelemetry's environment variables (`OTEL_EXPORTER_OTLP_…`) set headers, certificates and compression.
    """
    return OTLPSpanExporter(endpoint=f"{url.rstrip('/')}/v1/traces", timeout=_EXPORT_TIMEOUT_S)


def _end(span: Span, event: SessionEnded) -> None:
    span.set_attributes(
        {
            "gen_ai.usage.output_tokens": event.num_tokens,
            "gen_ai.response.finish_reasons": (event.reason,),
            "dsd.ttft_s": event.ttft_s,
            "dsd.num_replays": event.num_replays,
        }
    )
    if event.error:
        span.set_status(Status(StatusCode.ERROR, event.error))
    span.end(_nanoseconds(event.at_s))


def _chain(stages: tuple[StageOf, ...]) -> tuple[str, ...]:
    return tuple(f"{stage.peer} [{stage.first}, {stage.last})" for stage in stages)


def _nanoseconds(at_s: float) -> int:
    return round(at_s * 1e9)
