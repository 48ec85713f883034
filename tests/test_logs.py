"""Structured logs: fields and contexts, limits on what repeats, and what a manager says."""

import datetime
import io
import json
import logging
import threading

import pytest

from kvbm_jax import logs
from kvbm_jax.errors import ConfigError
from tests.tiered import HOST, Faulty, make, prompt, serve, settle


@pytest.fixture(autouse=True)
def as_before():
    """Leaves the library's logger as it was."""
    logger = logging.getLogger("kvbm_jax")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)
    logger.propagate = propagate


@pytest.fixture
def written():
    """Configures JSON at level debug; returns what has been written since."""
    stream = io.StringIO()
    logs.configure("json", level="debug", stream=stream, limit=logs.RateLimit(1000))
    return lambda: [json.loads(line) for line in stream.getvalue().splitlines()]


LOG = logging.getLogger("kvbm_jax.somewhere")


def test_a_line_is_a_json_object_with_fields(written):
    LOG.info("moved %d blocks", 3, extra=logs.fields(tier="g2", hashes=["ab"], message="not this one"))
    [line] = written()
    when = datetime.datetime.fromisoformat(line.pop("time"))
    assert abs(when - datetime.datetime.now(datetime.UTC)) < datetime.timedelta(minutes=1)
    assert line == {
        "level": "info",
        "logger": "kvbm_jax.somewhere",
        "message": "moved 3 blocks",
        "tier": "g2",
        "hashes": ["ab"],
    }


def test_errors_are_told_with_their_trace_on_one_line(written):
    try:
        logs.RateLimit(0)
    except ConfigError:
        LOG.exception("it failed", extra=logs.fields(odd=object))
    [line] = written()
    assert (line["level"], line["error"]["type"], line["error"]["message"]) == (
        "error",
        "ConfigError",
        "a limit of 0 messages in 1.0 seconds; name at least 1, and more than 0",
    )
    assert "test_logs.py" in line["error"]["trace"]
    assert line["odd"] == "<class 'object'>"


def test_contexts_nest_and_are_of_their_thread(written):
    with logs.context(request_id="r", user="u"):
        with logs.context(user="v"):
            LOG.info("inner", extra=logs.fields(row=1))
            thread = threading.Thread(target=LOG.info, args=("another thread",))
            thread.start()
            thread.join(60)
        LOG.info("outer")
    LOG.info("none")
    kept = [{k: v for k, v in line.items() if k in {"request_id", "user", "row"}} for line in written()]
    assert kept == [{"request_id": "r", "user": "v", "row": 1}, {}, {"request_id": "r", "user": "u"}, {}]


def test_the_console_shows_the_same():
    stream = io.StringIO()
    logs.configure("console", stream=stream)
    LOG.warning("careful", extra=logs.fields(blocks=3, tier="g2"))
    LOG.debug("not told")
    try:
        int("no")
    except ValueError:
        LOG.exception("failed")
    first, second, *trace = stream.getvalue().splitlines()
    assert first.split(" ", 1)[1] == 'warning kvbm_jax.somewhere: careful blocks=3 tier="g2"'
    assert second.endswith("kvbm_jax.somewhere: failed")
    assert trace[-1].startswith("ValueError: invalid literal")


def test_what_repeats_is_told_a_few_times_and_then_how_often_it_was_not():
    now, stream = [0.0], io.StringIO()
    logs.configure("json", stream=stream, limit=logs.RateLimit(2, 10, clock=lambda: now[0]))
    for i in range(100):
        LOG.info("block %d", i)
        LOG.warning("block %d", i)
    now[0] = 10.0
    LOG.info("block %d", 100)
    LOG.info("another")
    told = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(t["level"], t["message"], t.get("not_told")) for t in told] == [
        ("info", "block 0", None),
        ("warning", "block 0", None),
        ("info", "block 1", None),
        ("warning", "block 1", None),
        ("info", "block 100", 98),
        ("info", "another", None),
    ]


def test_a_limit_remembers_a_bounded_number_of_messages():
    limit = logs.RateLimit()
    for i in range(5000):
        assert limit.filter(logging.LogRecord("kvbm_jax", logging.INFO, "", 0, f"message {i}", (), None))
    assert len(limit._seen) <= 1024


def test_a_limit_counts_right_from_many_threads():
    stream = io.StringIO()
    logs.configure("json", stream=stream, limit=logs.RateLimit(10, 1, clock=lambda: 0.0))
    threads = [threading.Thread(target=lambda: [LOG.info("again") for _ in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(stream.getvalue().splitlines()) == 10


def test_configuring_again_replaces_and_keeps_what_is_not_ours():
    logger, own = logging.getLogger("kvbm_jax"), logging.NullHandler()
    logger.addHandler(own)
    first, second = io.StringIO(), io.StringIO()
    logs.configure("json", stream=first)
    logs.configure("json", stream=second)
    LOG.info("once")
    assert not first.getvalue()
    assert len(second.getvalue().splitlines()) == 1
    assert own in logger.handlers


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: logs.configure("xml"), "format = 'xml': allowed is one of json, console"),
        (lambda: logs.configure(level="loud"), "level = 'loud': allowed is one of debug, info"),
        (lambda: logs.RateLimit(0), "a limit of 0 messages in 1.0 seconds"),
    ],
)
def test_wrong_choices_are_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_a_manager_tells_what_happens_to_requests_and_blocks(written):
    with make(**HOST, host_blocks=16, max_sequences=2) as manager:
        first = prompt(0, 3)
        with logs.context(request_id="one"):
            serve(manager, first)
        with logs.context(request_id="two"):
            serve(manager, prompt(100, 7))
        settle(manager)
        with logs.context(request_id="three"):
            assert sum(serve(manager, first).values()) == 12
    told = {}
    for line in written():
        told.setdefault((line.get("request_id"), line["message"]), []).append(line)
    [began] = told["three", "a sequence begins"]
    assert (began["tokens"], began["found"], began["logger"]) == (13, {"g2": 12}, "kvbm_jax.request_log")
    [allocated] = told["two", "blocks allocated"]
    assert len(allocated["evicted"]) == 3
    moved = [line for line in told[None, "blocks moved"] if line["source"] == "g1"]
    assert {(line["target"], line["blocks"]) for line in moved} >= {("g2", 3)}
    [brought] = told["three", "blocks moved"]
    assert (brought["source"], brought["target"], brought["blocks"]) == ("g2", "g1", 3)


def test_a_manager_tells_which_blocks_failed(written):
    from kvbm_jax.identity import CacheIdentity
    from kvbm_jax.offload.host import HostBlockStore

    with make(max_sequences=2) as sample:
        identity = CacheIdentity.of(sample.layout, model_id="", hash_algorithm=sample.config.hash_algorithm)
        store = Faulty(HostBlockStore(sample.layout.block_bytes, 16, identity=identity))
    store.fail_puts = True
    with make(stores=[store], max_sequences=2) as manager:
        with manager.start(prompt(0, 1)) as seq:
            manager.register(seq)
            name = seq.hashes[0].tobytes().hex()
        serve(manager, prompt(100, 7))
        settle(manager)
    [line] = [line for line in written() if line["message"] == "blocks did not arrive"]
    assert (line["level"], line["source"], line["target"]) == ("warning", "g1", "g2")
    assert line["reasons"] == {"failed": 1}
    assert line["hashes"] == [name]
