"""Generating text through the functional pool: what a small inference server does, in one file.

An `Engine` holds a model and a `BlockManager`. A prompt's cached prefix is found by the manager; only the rest is
prefilled, in chunks of a few fixed sizes. Decoding then runs many tokens in one compiled program: a `lax.scan` whose
body extends the sequences from a grant, stores keys and values, attends and samples, without a word from the host.
All programs are compiled by the constructor, so that later timings are of the work alone.

Axes: `S` denotes the tokens of a prefill chunk, `B` the rows of the sequence batch, `K` the steps of a decode call.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import kvbm_jax
from kvbm_jax import BlockManager, KvBlockManagerConfig, KVCache, SequenceBatch, Status, grants
from kvbm_jax.errors import CacheLostError, ConfigError, SequenceTooLongError
from kvbm_jax.protocols import MetricsSink, Tier
from smollm2.model import Llama
from smollm2.sampling import Sampler

__all__ = ["Completion", "Engine"]

_DECODE_STEPS = 16


@dataclass
class Completion:
    """One answer and how it came about; seconds are taken after device completion and hold no compilation."""

    prompt: list[int]
    max_tokens: int
    hits: dict[Tier, int] = field(default_factory=dict)  # prompt tokens found cached, by tier
    tokens: list[int] = field(default_factory=list)  # the end-of-sequence token included, if the model gave it
    ttft_seconds: float = 0.0  # from the tokens of the prompt to the first token of the answer
    decode_seconds: float = 0.0  # for all tokens after the first

    @property
    def num_cached(self) -> int:
        """Prompt tokens found cached."""
        return sum(self.hits.values())

    @property
    def num_prefilled(self) -> int:
        """Prompt tokens that were computed."""
        return len(self.prompt) - self.num_cached

    @property
    def decode_tokens_per_second(self) -> float:
        """Speed after the first token; 0 if there was only one."""
        return (len(self.tokens) - 1) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class _Request:
    """A running sequence's request, as far as it is not in the sequence."""

    completion: Completion
    seed: int
    ignore_eos: bool


class Engine:
    """A model, its paged cache, and the compiled programs that join them.

    Args:
      model: the decoder.
      block_size: tokens of a block.
      num_blocks: blocks of the pool.
      max_sequences: rows that decode together, B.
      dtype: of the cache.
      sampler: how the next token is chosen.
      chunks: sizes in tokens that prefill is cut into, rising; one program is compiled for each.
      tiers: keys of `KvBlockManagerConfig` for the tiers below the device; `KVBM_*` variables say the rest.
      metrics: where the manager's measurements go; None = nowhere.

    Raises:
      ConfigError: if a size is out of range.
    """

    def __init__(
        self,
        model: Llama,
        *,
        block_size: int,
        num_blocks: int,
        max_sequences: int = 1,
        dtype: str = "float32",
        sampler: Sampler | None = None,
        chunks: Sequence[int] = (16, 32, 48, 64, 128, 256, 512),
        tiers: Mapping[str, Any] | None = None,
        metrics: MetricsSink | None = None,
    ) -> None:
        self._sampler = Sampler() if sampler is None else sampler
        self._context = model.config.context_length
        self._eos = model.config.eos_id
        self._graph, self._params = nnx.split(model)
        self._running: dict[kvbm_jax.Sequence, _Request] = {}
        self.manager = BlockManager(
            KvBlockManagerConfig.load(
                block_size=block_size,
                num_blocks=num_blocks,
                num_layers=model.config.num_layers,
                num_kv_heads=model.config.num_kv_heads,
                head_dim=model.config.head_dim,
                dtype=dtype,
                **(tiers or {}),
            ),
            max_sequences=max_sequences,
            max_sequence_tokens=self._context,
            metrics=metrics,
        )
        begun = time.perf_counter()
        self._grant_blocks = max_sequences * (_DECODE_STEPS // block_size + 2)
        self._prefill = {size: self._compile_prefill(size) for size in chunks}
        self._decode = self._compile_decode(max_sequences)
        self.manager.warm_up()
        # A program's first run is slower than the next ones, also when it is compiled.
        room = min(num_blocks * block_size, self._context)
        for size in chunks:
            if size + 2 <= room:
                self.generate([[self._eos] * size], 2, reuse=False, ignore_eos=True)
        self.compile_seconds = time.perf_counter() - begun

    def close(self) -> None:
        """Brings what is cached to the disk tier, if there is one, and ends the manager."""
        self.manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.manager.__exit__(kind, error, trace)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        *,
        salt: str = "",
        reuse: bool = True,
        seed: int = 0,
        ignore_eos: bool = False,
    ) -> list[Completion]:
        """Answers prompts together, one row each; see `stream`."""
        options = {"salt": salt, "reuse": reuse, "seed": seed, "ignore_eos": ignore_eos}
        *_, completions = self.stream(prompts, max_tokens, **options)
        return completions

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        *,
        salt: str = "",
        reuse: bool = True,
        seed: int = 0,
        ignore_eos: bool = False,
    ) -> Iterator[list[Completion]]:
        """Answers prompts, yielding the completions as they grow: after prefill, then every few tokens.

        Args:
          prompts: token ids, up to B prompts.
          max_tokens: bound of each answer.
          salt: prefixes are shared within equal salts only.
          reuse: False to compute everything, and to leave nothing in the cache.
          seed: of the sampler; equal seeds give equal answers.
          ignore_eos: go on after the end-of-sequence token, for exactly `max_tokens`.

        Raises:
          SequenceTooLongError: if a prompt and its answer exceed the model's context or the pool.
          OutOfBlocksError: if the pool cannot hold all of them at once.
          ConfigError: if `max_tokens` is not positive.
        """
        if max_tokens < 1:
            raise ConfigError(f"max_tokens is {max_tokens}; it must be at least 1")
        for prompt in prompts:
            if len(prompt) + max_tokens > self._context:
                raise SequenceTooLongError(
                    f"a prompt of {len(prompt)} tokens and an answer of {max_tokens} exceed the model's context of "
                    f"{self._context}; shorten the prompt or ask for fewer tokens"
                )
        key = jax.random.key(seed)
        completions = [Completion(list(prompt), max_tokens) for prompt in prompts]
        running: list[kvbm_jax.Sequence] = []
        try:
            for completion in completions:
                begun = time.perf_counter()
                seq = self.manager.start(completion.prompt, salt=salt, reuse=reuse)
                running.append(seq)
                self._running[seq] = _Request(completion, seed, ignore_eos)
                completion.tokens.append(self._compute(seq, key))
                completion.ttft_seconds = time.perf_counter() - begun
                completion.hits = dict(seq.hits)
            yield completions
            yield from self._decode_all(completions, running, key, ignore_eos)
        finally:
            self._end(running)

    def hand_over(self, to_worker: str) -> int:
        """Moves all running answers to another worker, whose engine goes on with them in `take_over`: drains this one.

        Called while `stream` is between two of its yields; the stream ends with what it has. Returns how many answers
        there were. See `BlockManager.migrate` for what is raised; those that have not moved go on here.
        """
        leaving = [seq for seq in self._running if not seq.released]
        for seq in leaving:
            request = self._running[seq]
            done = request.completion
            said = {"max_tokens": done.max_tokens, "tokens": done.tokens, "prompt": len(done.prompt)}
            said |= {"seed": request.seed, "ignore_eos": request.ignore_eos}
            self.manager.migrate(seq, to_worker, payload=json.dumps(said).encode())
        return len(leaving)

    def take_over(self, timeout: float) -> Iterator[list[Completion]] | None:
        """Goes on with an answer that another worker hands over; None if none comes in so many seconds.

        Yields the answer as `stream` does, its first tokens being the other worker's.
        """
        arrival = self.manager.accept(timeout)
        return None if arrival is None else self._go_on(arrival.seq, json.loads(arrival.payload))

    def _go_on(self, seq: kvbm_jax.Sequence, said: dict[str, Any]) -> Iterator[list[Completion]]:
        key, ignore_eos = jax.random.key(said["seed"]), said["ignore_eos"]
        completion = Completion(seq.tokens[: said["prompt"]], said["max_tokens"], dict(seq.hits), said["tokens"])
        self._running[seq] = _Request(completion, said["seed"], ignore_eos)
        try:
            self._compute(seq, key)  # the token after these has been sampled before
            yield [completion]
            yield from self._decode_all([completion], [seq], key, ignore_eos)
        finally:
            self._end([seq])

    def _end(self, running: Sequence[kvbm_jax.Sequence]) -> None:
        for seq in running:
            del self._running[seq]
            if not seq.released:
                self.manager.release(seq)

    def _compute(self, seq: kvbm_jax.Sequence, key: jax.Array) -> int:
        """Prefills what is not cached of a sequence, and samples the token after it."""
        tables = self.manager.sequences
        first = seq.num_cached
        while first < len(seq.tokens):
            left = len(seq.tokens) - first
            size = next((size for size in self._prefill if size >= left), max(self._prefill))
            count = min(left, size)
            chunk = np.zeros((size,), np.int32)
            chunk[:count] = seq.tokens[first : first + count]
            token = self.manager.run(
                self._prefill[size], self._params, tables, np.int32(seq.row), np.int32(first), chunk,
                np.int32(count), key,
            )  # fmt: skip
            first += count
        self.manager.register(seq)
        return int(token)

    def _decode_all(
        self,
        completions: list[Completion],
        running: list[kvbm_jax.Sequence],
        key: jax.Array,
        ignore_eos: bool,
    ) -> Iterator[list[Completion]]:
        rows = self.manager.max_sequences
        eos = np.int32(-1 if ignore_eos else self._eos)
        tokens, budget = np.zeros((rows,), np.int32), np.zeros((rows,), np.int32)
        for completion, seq in zip(completions, running, strict=True):
            tokens[seq.row] = completion.tokens[-1]
            if tokens[seq.row] != eos and not seq.released:
                budget[seq.row] = completion.max_tokens - len(completion.tokens)
        while budget.any():
            begun = time.perf_counter()
            active = [(c, s) for c, s in zip(completions, running, strict=True) if budget[s.row]]
            growth = {seq: min(_DECODE_STEPS, int(budget[seq.row])) for _, seq in active}
            grant = self.manager.reserve(growth, max_blocks=self._grant_blocks)
            try:
                tables, grant, last, left, produced, emitted = self.manager.run(
                    self._decode, self._params, self.manager.sequences, grant, tokens, budget, eos, key
                )
            except BaseException as error:
                if not isinstance(error, CacheLostError):
                    self.manager.give_back(grant)
                raise
            produced, emitted = np.asarray(produced), np.asarray(emitted)
            gained = {seq: produced[emitted[:, seq.row], seq.row].tolist() for _, seq in active}
            # A sequence holds the tokens that were fed; the newest has been sampled only.
            self.manager.commit(grant, tables, {seq: [int(tokens[seq.row]), *new[:-1]] for seq, new in gained.items()})
            tokens, budget = np.array(last), np.array(left)
            seconds = time.perf_counter() - begun
            for completion, seq in active:
                completion.tokens.extend(gained[seq])
                completion.decode_seconds += seconds
            yield completions
            for seq in running:
                if seq.released:  # it was handed over meanwhile
                    budget[seq.row] = 0

    def _compile_prefill(self, size: int) -> Callable[..., tuple[KVCache, jax.Array]]:
        graph, choose = self._graph, _row_sampler(self._sampler)

        def prefill(
            cache: KVCache,
            params: nnx.State,
            running: SequenceBatch,
            row: jax.Array,
            first: jax.Array,
            token_ids: jax.Array,
            count: jax.Array,
            key: jax.Array,
        ) -> tuple[KVCache, jax.Array]:
            """Computes `count` tokens i32[S] of a row from position `first`; samples the token after them, i32[]."""
            model = nnx.merge(graph, params)
            batch = kvbm_jax.step_batch(
                running, row[None], first[None], count[None], num_tokens=size, max_query_len=size
            )
            hidden, cache = model(token_ids, batch, cache, attend=kvbm_jax.attend)
            logits = model.logits(hidden[batch.last_tokens])
            return cache, choose(logits, key, (first + count)[None])[0]

        scalar = jax.ShapeDtypeStruct((), jnp.int32)
        chunk = jax.ShapeDtypeStruct((size,), jnp.int32)
        return self._compile(prefill, self.manager.sequences, scalar, scalar, chunk, scalar, jax.random.key(0))

    def _compile_decode(self, rows: int) -> Callable[..., tuple[KVCache, tuple]]:
        graph, choose = self._graph, _row_sampler(self._sampler)

        def decode(
            cache: KVCache,
            params: nnx.State,
            running: SequenceBatch,
            grant: grants.Grant,
            tokens: jax.Array,
            budget: jax.Array,
            eos: jax.Array,
            key: jax.Array,
        ) -> tuple[KVCache, tuple]:
            """Decodes up to K tokens for each row that has a budget.

            Returns the cache and (sequences, grant, newest tokens i32[B], budgets i32[B], tokens i32[K, B], which of
            them are real bool[K, B]).
            """
            model = nnx.merge(graph, params)

            def step(carry: tuple) -> tuple[tuple, tuple[jax.Array, jax.Array]]:
                cache, running, grant, tokens, budget = carry
                running, grant, status = grants.extend(running, grant, (budget > 0).astype(jnp.int32))
                active = (budget > 0) & (status == Status.OK)
                batch = kvbm_jax.decode_batch(running, active)
                hidden, cache = model(tokens, batch, cache, attend=kvbm_jax.attend)
                sampled = choose(model.logits(hidden), key, running.lengths)
                tokens = jnp.where(active, sampled, tokens)
                budget = jnp.where(active & (tokens != eos), budget - 1, 0)
                return (cache, running, grant, tokens, budget), (tokens, active)

            def step_if_any(carry: tuple, _: None) -> tuple[tuple, tuple[jax.Array, jax.Array]]:
                budget = carry[-1]
                return jax.lax.cond(jnp.any(budget > 0), step, lambda c: (c, (c[3], budget > 0)), carry)

            carry = (cache, running, grant, tokens, budget)
            (cache, *rest), produced = jax.lax.scan(step_if_any, carry, length=_DECODE_STEPS)
            return cache, (*rest, *produced)

        row = jax.ShapeDtypeStruct((rows,), jnp.int32)
        scalar = jax.ShapeDtypeStruct((), jnp.int32)
        grant = self.manager.reserve({}, max_blocks=self._grant_blocks)
        return self._compile(decode, self.manager.sequences, grant, row, row, scalar, jax.random.key(0))

    def _compile[R](self, program: Callable[..., tuple[KVCache, R]], *args: object) -> Callable[..., tuple[KVCache, R]]:
        """Compiles a program of (cache, params, *args) ahead of its first call; it takes the cache donated."""
        return jax.jit(program, donate_argnums=0).lower(self.manager.cache, self._params, *args).compile()


def _row_sampler(sampler: Sampler) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Gives each row a key of its own by position: an answer depends neither on its neighbours nor on call sizes.

    Returns a function of logits float32[B, V], the key and positions i32[B].
    """

    def choose(logits: jax.Array, key: jax.Array, positions: jax.Array) -> jax.Array:
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, positions)
        return jax.vmap(lambda row, row_key: sampler(row[None], row_key)[0])(logits, keys)

    return choose
