"""Spans of requests, by OpenTelemetry's own exporter: whole lives, refusals, forks, and a cache that is lost."""

import logging

import pytest

from kvbm_jax.errors import CacheLostError, OutOfBlocksError
from tests.tiered import HOST, make, prompt, serve, settle

sdk = pytest.importorskip("opentelemetry.sdk.trace")
from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: E402
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter  # noqa: E402
from opentelemetry.trace import StatusCode  # noqa: E402

from kvbm_jax.monitoring.tracing import RequestTracer  # noqa: E402


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter):
    made = sdk.TracerProvider()
    made.add_span_processor(SimpleSpanProcessor(exporter))
    yield made
    made.shutdown()


@pytest.fixture
def manager(provider):
    with make(**HOST, host_blocks=16, max_sequences=2, observer=RequestTracer(provider)) as owner:
        yield owner


def requests(exporter):
    return [span for span in exporter.get_finished_spans() if span.name == "kvbm.request"]


def test_a_request_is_a_span_of_the_callers(manager, provider, exporter):
    with provider.get_tracer("server").start_as_current_span("http") as parent:
        serve(manager, prompt(0, 3), lora_name="x")
    admit, request, _ = exporter.get_finished_spans()
    assert request.parent.span_id == parent.get_span_context().span_id
    assert (admit.name, admit.parent.span_id) == ("kvbm.admit", request.context.span_id)
    assert request.start_time <= admit.start_time <= admit.end_time <= request.end_time
    assert request.status.status_code is StatusCode.UNSET
    assert request.attributes == {
        "kvbm.tokens.prompt": 13,
        "kvbm.lora_name": "x",
        "kvbm.tokens.cached": 0,
        "kvbm.tokens.g1": 0,
        "kvbm.tokens.total": 13,
        "kvbm.blocks.registered": 3,
    }


def test_a_span_says_where_the_prefix_was(manager, exporter):
    serve(manager, prompt(0, 3))
    serve(manager, prompt(100, 7))
    settle(manager)
    serve(manager, prompt(0, 3))
    found = requests(exporter)[-1].attributes
    assert (found["kvbm.tokens.cached"], found["kvbm.tokens.g1"], found["kvbm.tokens.g2"]) == (12, 0, 12)


def test_a_request_that_cannot_begin_is_an_error(manager, exporter):
    with manager.start(prompt(0, 5)), pytest.raises(OutOfBlocksError):
        manager.start(prompt(100, 5))
    refused = requests(exporter)[0]
    assert refused.status.status_code is StatusCode.ERROR
    assert refused.status.description.startswith("6 blocks are needed")
    assert [event.attributes["exception.type"] for event in refused.events] == ["kvbm_jax.errors.OutOfBlocksError"]
    assert len(requests(exporter)) == 2


def test_forks_and_ends_by_a_step_have_spans_too(manager, exporter):
    first = manager.start(prompt(0, 1))
    second = manager.fork(first)
    manager.step({}, ending=[first])
    assert len(requests(exporter)) == 1
    manager.release(second)
    assert len(requests(exporter)) == 2
    manager.resume(second)
    manager.release(second)
    assert len(requests(exporter)) == 3


def test_what_is_lost_with_the_cache_ends(manager, exporter):
    manager.start(prompt(0, 1))

    def destroy(cache):
        for array in cache.arrays:
            array.delete()
        raise RuntimeError("gone")

    with pytest.raises(CacheLostError):
        manager.run(destroy)
    assert len(requests(exporter)) == 1


class Breaking:
    def __getattr__(self, name):
        raise OSError(name)


def test_an_observer_that_breaks_changes_nothing(caplog):
    with make(**HOST, host_blocks=16, max_sequences=2, observer=Breaking()) as manager:
        with caplog.at_level(logging.ERROR, "kvbm_jax"):
            serve(manager, prompt(0, 3))
        assert caplog.text.count("an observer of requests failed") == 3
        assert manager.match(prompt(0, 3)) == 12
