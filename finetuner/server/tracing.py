"""OpenTelemetry spans over the stages of a request; where tracing is off they cost nothing.

Jina makes the tracer where a Flow says `tracing: true`; see docs/operations.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer

_OFF: AbstractContextManager[None] = nullcontext()


def stage_span(
    tracer: Tracer | None,
    context: Context | None,
    name: str,
    attributes: Mapping[str, Any] | None = None,
) -> AbstractContextManager[Span | None]:
    """A span around a `with` block.

    An Executor has the tracer as `self.tracer`, and its endpoints are handed the context as
    `tracing_context`. Work in another thread gives the context along; in the same task None will
    do, and the span goes under the one around it.

    Args:
        tracer: None where tracing is off.
        context: of the span it belongs under, None for the current one.
        name: such as `read` or `embed`.
        attributes: numbers and short texts; never contents or tokens.

    Returns:
        A context manager that gives the span, or None where tracing is off.
    """
    if tracer is None:
        return _OFF
    return tracer.start_as_current_span(name, context=context, attributes=attributes)


def stage_spans(
    tracer: Tracer | None,
    context: Context | None,
    stages: Mapping[str, tuple[float, float]],
    attributes: Mapping[str, Any],
) -> None:
    """Spans of what is over already, such as work that threads did for several requests at once.

    Args:
        tracer: None where tracing is off.
        context: of the span they belong under, None for the current one.
        stages: when each began and ended, in seconds since the epoch.
        attributes: see `stage_span`.
    """
    if tracer is None:
        return
    for name, (start, end) in stages.items():
        span = tracer.start_span(
            name, context=context, attributes=attributes, start_time=int(start * 1e9)
        )
        span.end(int(end * 1e9))


def parent_of(headers: Mapping[str, str]) -> Context | None:
    """The context that a client sent in the headers `traceparent` and `tracestate`."""
    if 'traceparent' not in headers:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract(
        {name: headers[name] for name in ('traceparent', 'tracestate') if name in headers}
    )
