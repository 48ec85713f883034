"""Spans of OpenTelemetry for the life of a request; needs the extra `opentelemetry`.

    manager = BlockManager(config, observer=RequestTracer())

    server's own span                          the caller's current span is the parent
    +-- kvbm.request                           from `start` (or `resume`, `fork`) to the release
        +-- kvbm.admit                         prefix found, brought up, blocks allocated

`kvbm.request` carries `kvbm.tokens.prompt`, `kvbm.tokens.cached`, `kvbm.tokens.g1` and so on by tier, and at its end
`kvbm.tokens.total` and `kvbm.blocks.registered`. A request that could not begin has the status ERROR and
the exception.
"""

from typing import NamedTuple

from kvbm_jax.extras import needs
from kvbm_jax.handles import Sequence

with needs("opentelemetry", "spans of requests"):
    from opentelemetry import trace

__all__ = ["RequestTracer"]


class _Spans(NamedTuple):
    """Of one request."""

    request: trace.Span
    admit: trace.Span


class RequestTracer:
    """An observer that turns requests into spans.

    Args:
      provider: makes the tracer; None for the global one.
    """

    def __init__(self, provider: trace.TracerProvider | None = None) -> None:
        self._tracer = trace.get_tracer("kvbm_jax", tracer_provider=provider)
        self._spans: dict[Sequence, _Spans] = {}

    def began(self, seq: Sequence) -> None:
        """Begins the spans of a request."""
        attributes: dict[str, str | int] = {"kvbm.tokens.prompt": len(seq.tokens)}
        if seq.lora_name is not None:
            attributes["kvbm.lora_name"] = seq.lora_name
        request = self._tracer.start_span("kvbm.request", attributes=attributes)
        admit = self._tracer.start_span("kvbm.admit", context=trace.set_span_in_context(request))
        self._spans[seq] = _Spans(request, admit)

    def admitted(self, seq: Sequence) -> None:
        """Ends the span of the admission."""
        spans = self._spans[seq]
        spans.request.set_attribute("kvbm.tokens.cached", seq.num_cached)
        for tier, tokens in seq.hits.items():
            spans.request.set_attribute(f"kvbm.tokens.{tier.label}", tokens)
        spans.admit.end()

    def ended(self, seq: Sequence, error: BaseException | None) -> None:
        """Ends the spans of a request."""
        spans = self._spans.pop(seq)
        if error is None:
            spans.request.set_attribute("kvbm.tokens.total", len(seq.tokens))
            spans.request.set_attribute("kvbm.blocks.registered", seq.num_registered)
        else:
            for span in (spans.admit, spans.request):
                span.set_status(trace.Status(trace.StatusCode.ERROR, str(error)))
            spans.request.record_exception(error)
            spans.admit.end()
        spans.request.end()
