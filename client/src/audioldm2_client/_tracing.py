"""Distributed traces: W3C trace context from the caller to the server, and a span where OpenTelemetry is in use.

https://www.w3.org/TR/trace-context/. OpenTelemetry is taken only where the calling program has imported it already:
without that, none is configured, and importing it here would do nothing but cost time. A span never holds a prompt, and
no words of an error, which may quote one.
"""

import contextvars
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from audioldm2_client._connection import sendable_headers
from audioldm2_client._exceptions import RequestCancelledError
from audioldm2_client._request import InferenceRequest
from audioldm2_client._result import GenerationResult

if TYPE_CHECKING:
    from opentelemetry.trace import Span

SPAN_NAME = "audioldm2.generate"

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?P<more>-.*)?")
_VERSION_WITHOUT_MORE = "00"

# Inputs of a request that a span tells; none of them is a text of the caller's.
_TOLD = ("num_inference_steps", "audio_length_in_s", "num_waveforms_per_prompt")


@dataclass(frozen=True)
class TraceParent:
    """Where in a trace a generation belongs; nowhere, as long as `headers` is empty.

    Attributes:
        headers: `traceparent`, and `tracestate` where there is one.
    """

    headers: Mapping[str, str] = field(default_factory=dict)


NO_PARENT = TraceParent()


def read_parent(traceparent: str | None, tracestate: str | None) -> TraceParent:
    """Return the parent that a caller names. As the standard asks, one that isn't valid is ignored.

    Raises:
        TypeError: not text.
    """
    for name, value in (("traceparent", traceparent), ("tracestate", tracestate)):
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{name} must be a str; got {type(value).__name__}")
    found = _TRACEPARENT.fullmatch(traceparent or "")
    if not traceparent or found is None or (found["more"] and traceparent.startswith(_VERSION_WITHOUT_MORE)):
        return NO_PARENT
    return TraceParent(sendable_headers({"traceparent": traceparent, "tracestate": tracestate or ""}))


class GenerationSpan:
    """The span of one generation, or what stands for it where OpenTelemetry isn't in use.

    Attributes:
        headers: to be sent with the request, names in lower case.
    """

    def __init__(self, headers: Mapping[str, str], span: "Span | None" = None) -> None:
        self.headers = headers
        self._span = span

    def context(self) -> contextvars.Context:
        """Return a copy of the present context in which this span is the current one."""
        context = contextvars.copy_context()
        if self._span is not None:
            from opentelemetry import context as contexts
            from opentelemetry import trace

            context.run(contexts.attach, trace.set_span_in_context(self._span))
        return context

    def end(self, result: GenerationResult | None, error: BaseException | None) -> None:
        """Note the outcome, and end the span; a second time does nothing."""
        span, self._span = self._span, None
        if span is None:
            return
        span.set_attribute("audioldm2.outcome", "done" if error is None else type(error).__name__)
        if result is not None:
            span.set_attribute("audioldm2.audio_length_in_s", result.audio.shape[1] / result.sampling_rate)
        if error is not None and not _is_cancellation(error):
            from opentelemetry.trace import StatusCode

            span.set_attribute("error.type", type(error).__name__)
            span.set_status(StatusCode.ERROR)
        span.end()


def start_span(request: InferenceRequest, parent: TraceParent) -> GenerationSpan:
    """Start the span of a generation, below the caller's current one unless the caller has named another parent."""
    if "opentelemetry.trace" not in sys.modules:
        return GenerationSpan(parent.headers)
    from opentelemetry import propagate, trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    context = TraceContextTextMapPropagator().extract(parent.headers) if parent.headers else None
    tracer = trace.get_tracer("audioldm2_client")
    span = tracer.start_span(SPAN_NAME, context=context, kind=trace.SpanKind.CLIENT, attributes=_attributes(request))
    headers: dict[str, str] = {}
    propagate.inject(headers, context=trace.set_span_in_context(span, context))
    return GenerationSpan({**parent.headers, **sendable_headers(headers)}, span)


def _attributes(request: InferenceRequest) -> dict[str, Any]:
    given = {tensor.name: tensor.data for tensor in request.inputs if tensor.name in _TOLD}
    return {
        "audioldm2.request_id": request.id,
        "audioldm2.model": request.model_name,
        "audioldm2.prompts": len(request.prompts),
        **{f"audioldm2.{name}": data[0].item() for name, data in given.items()},
    }


def _is_cancellation(error: BaseException) -> bool:
    return isinstance(error, RequestCancelledError) or not isinstance(error, Exception)
