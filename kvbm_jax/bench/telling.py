"""What it costs a server to tell of its blocks: decode steps that publish events, or measure, beside such that do not.

A step is whole: the manager's bookkeeping for eight sequences (`BlockManager.step`), then one program, a decoder of
SmolLM2-135M's sizes, until its tokens are on the host. The sequences stand at different places of their blocks, so that
every other step completes one and takes one from the oldest; those that are long enough end, and others begin, between
the steps. All servers take a step in each round, in an order drawn anew, and what a server's steps take more is the
median of the differences within rounds: what slows the machine for a while leaves it as it is.

What is published is read by another process over ZeroMQ, and stored by a NATS server; both run beside the steps.
"""

import contextlib
import functools
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kvbm_jax.bench.decoder import SMOLLM2_135M, Sizes, Weights, decode, init
from kvbm_jax.bench.events import listening
from kvbm_jax.bench.timing import Row, Timing
from kvbm_jax.cache import KVCache
from kvbm_jax.config import CacheDtype, KvBlockManagerConfig
from kvbm_jax.events import EventType, KvEvent
from kvbm_jax.handles import Sequence
from kvbm_jax.manager import BlockManager
from kvbm_jax.metrics import InMemoryMetrics, NullMetrics
from kvbm_jax.protocols import MetricsSink
from kvbm_jax.transports.nats_server import NatsServer

__all__ = ["measure"]

_ROUNDS = 30  # for each repetition
_ROWS = 8
_BLOCK_SIZE = 16
_PROMPT, _LONGEST = 33, 112  # tokens
_NUM_BLOCKS = 80
_BASELINE = "the same step without events and metrics"


def measure(timing: Timing, sizes: Sizes = SMOLLM2_135M) -> list[Row]:
    """Times the steps of servers that differ in what they tell; the last row is one more that tells nothing."""
    weights = init(sizes)
    program = jax.jit(functools.partial(decode, sizes=sizes), donate_argnums=0)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = stack.enter_context(NatsServer(folder / "nats")).url
        ends = f"ipc://{folder}/events", f"ipc://{folder}/events-replay"

        def serve(metrics: MetricsSink | None = None, **config: Any) -> _Server:
            return stack.enter_context(contextlib.closing(_Server(sizes, weights, program, metrics, config)))

        servers = {
            "nothing": serve(events="none"),
            "events over zmq": serve(events="zmq", events_url=ends[0]),
            "events to jetstream": serve(events="nats", events_url=url),
            "metrics": serve(InMemoryMetrics(), events="none"),
            "nothing, once more": serve(events="none"),
        }
        stack.enter_context(listening(["ours", *ends, str(1 << 60)], servers["events over zmq"].greet))
        draw, order, rounds = random.Random(0), list(servers), timing.repeats * _ROUNDS
        times = []
        for number in range(_ROUNDS + rounds):
            timing.progress(f"a decode step: {number} of {_ROUNDS + rounds}")
            draw.shuffle(order)
            times.append({name: servers[name].step() for name in order})
    counted = times[_ROUNDS:]
    base, *others = servers
    seconds = statistics.median(taken[base] for taken in counted)
    more = {name: statistics.median(taken[name] - taken[base] for taken in counted) for name in others}
    return [Row(f"decode step, {name}", seconds + more[name], _BASELINE, seconds) for name in others]


class _Server:
    """A manager and a model that decode together."""

    def __init__(
        self,
        sizes: Sizes,
        weights: Weights,
        program: Callable[..., tuple[KVCache, jax.Array]],
        metrics: MetricsSink | None,
        config: dict[str, Any],
    ) -> None:
        self._weights = weights
        self._program = program
        self._manager = BlockManager(
            KvBlockManagerConfig(
                block_size=_BLOCK_SIZE,
                num_blocks=_NUM_BLOCKS,
                num_layers=sizes.layers,
                num_kv_heads=sizes.kv_heads,
                head_dim=sizes.head_dim,
                dtype=CacheDtype.FLOAT32,
                **config,
            ),
            max_sequences=_ROWS,
            max_sequence_tokens=_LONGEST + _BLOCK_SIZE,
            metrics=NullMetrics() if metrics is None else metrics,
        )
        self._words = sizes.words
        self._fresh = itertools.count()
        self._running = [self._begin(_PROMPT + row * _BLOCK_SIZE // _ROWS) for row in range(_ROWS)]
        self._tokens = np.zeros((_ROWS,), np.int32)

    def step(self) -> float:
        """Decodes one token of every sequence; returns the seconds that took."""
        begun = time.perf_counter()
        self._manager.step({seq: [int(self._tokens[seq.row])] for seq in self._running})
        sampled = self._manager.run(self._program, self._manager.sequences, self._weights, self._tokens)
        self._tokens = np.array(sampled)
        seconds = time.perf_counter() - begun
        for place, seq in enumerate(self._running):
            if len(seq.tokens) >= _LONGEST:
                self._manager.release(seq)
                self._running[place] = self._begin(_PROMPT)
        return seconds

    def greet(self) -> None:
        """Publishes something."""
        self._manager.publish_event(KvEvent(EventType.CLEARED, 0, "", 0))

    def close(self) -> None:
        self._manager.close(flush=False)

    def _begin(self, length: int) -> Sequence:
        """A sequence whose prompt nobody has had before."""
        first = next(self._fresh) * _LONGEST
        return self._manager.start([(first + i) % self._words for i in range(length)])
