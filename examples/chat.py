"""Chat with SmolLM2-135M through the paged cache of kvbm_jax.

Without arguments, a scripted session in two halves. First three users ask about one long document, one after the other
and then again: whatever a prompt shares with earlier ones is found in the pool and not computed anew. Then ten tenants
share a pool that has room for one of them, and find their prefixes in host memory, on disk, and after a restart (see
tenants.py). Every answer is compared, token for token, with one computed without any reuse; the exit status is 1 if one
differs.

    uv run examples/chat.py
    uv run examples/chat.py --prompt "Why is the sky blue?" --offload-path cache
    uv run examples/chat.py --interactive --metrics-port 9464
    KVBM_CONTROLLER=auto KVBM_EVENTS=nats uv run examples/chat.py --interactive    # beside kvbm-jax status, events tail
"""

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import tenants
from options import at_least, seed
from smollm2 import Sampler, StreamDecoder, find_model, load_model, load_tokenizer, model_identity
from smollm2.engine import Completion, Engine

from kvbm_jax.errors import ConfigError, KvbmError
from kvbm_jax.metrics import InMemoryMetrics, NullMetrics
from kvbm_jax.protocols import MetricsSink

_HANDBOOK = Path(__file__).parent / "data" / "handbook.txt"
_SYSTEM = (
    "You are the assistant of a lighthouse station. Answer the question in one or two short sentences, using only the "
    "handbook that follows.\n\n"
)
_TURNS = (
    ("Ada", "How high is the tower?"),
    ("Ben", "What is the name of the supply boat, and how long does the crossing take?"),
    ("Cleo", "On which days is bread baked?"),
    ("Ada", "And who built it?"),
    ("Ben", "Who is her skipper?"),
    ("Cleo", "How many litres of water may each person use a day?"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit status: 0 fine, 1 a check or the library failed, 2 wrong usage."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.raw and args.prompt is None:
        parser.error("--raw goes with --prompt")
    try:
        with _served(args) as metrics:
            chat = _Chat(args, metrics)
            if args.restarted is not None:
                return chat.restarted(args.restarted)
            if args.interactive:
                return chat.interactive()
            if args.prompt is not None:
                return chat.once(args.prompt)
            return chat.scripted()
    except KvbmError as error:
        print(f"chat.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


class _Chat:
    """The three ways to talk."""

    def __init__(self, args: argparse.Namespace, metrics: MetricsSink) -> None:
        self._args = args
        self._metrics = metrics
        self._sampler = Sampler(args.temperature, args.top_p)
        self._tokenizer = load_tokenizer()
        begun = time.perf_counter()
        file = find_model()
        self._model, _ = load_model(file, dtype=jnp.dtype(args.dtype))
        self._model_id = f"smollm2-{model_identity(file)}-{args.dtype}"
        _tell(args, f"loaded in {time.perf_counter() - begun:.1f} s")

    def once(self, text: str) -> int:
        """Answers one prompt."""
        if self._args.raw:
            prompt = self._tokenizer.encode(text)
        else:
            prompt = self._tokenizer.apply_chat_template([{"role": "user", "content": text}])
        with self._engine(self._args.num_blocks, self._tiers()) as engine:
            answer = self._answer(engine, prompt)
        if self._args.json:
            print(
                json.dumps(
                    {
                        "prompt_token_ids": answer.prompt,
                        "output_token_ids": answer.tokens,
                        "text": self._text(answer),
                        "hits": tenants.hits_of(answer),
                        "ttft_s": answer.ttft_seconds,
                        "decode_tokens_per_s": answer.decode_tokens_per_second,
                    }
                )
            )
        return 0

    def interactive(self) -> int:
        """Talks until the end of input."""
        messages: list[dict[str, str]] = []
        with self._engine(self._args.num_blocks, self._tiers()) as engine:
            print("Type a message; an empty line or end of input leaves.")
            for line in _lines("> "):
                messages.append({"role": "user", "content": line})
                answer = self._answer(engine, self._tokenizer.apply_chat_template(messages))
                messages.append({"role": "assistant", "content": self._text(answer)})
        return 0

    def scripted(self) -> int:
        """Three users on the device alone, then ten tenants over all tiers; checks every answer."""
        with self._engine(self._args.num_blocks, {}) as engine:
            turns = self._users(engine)
        self._show_turns(turns)
        plan = self._plan(tenants.new_run_id())
        restart = [sys.executable, __file__, *self._options(), "--restarted", plan.run_id]
        rows = tenants.run(
            plan,
            self._engine,
            self._answer,
            lambda line: _tell(self._args, line),
            model_id=self._model_id,
            folder=self._args.offload_path,
            restart=restart,
        )
        self._show_tiers(rows)
        equal = all(row.equal for row in turns) and all(row.equal for row in rows)
        if self._args.json:
            found = {"turns": [row.as_dict() for row in turns], "tiers": [row.as_dict() for row in rows]}
            print(json.dumps(found | {"all_equal": equal}))
        else:
            print(
                "\nEvery answer is token for token the one computed without reuse."
                if equal
                else "\nAn answer differs from the one computed without reuse."
            )
        return 0 if equal else 1

    def restarted(self, run_id: str) -> int:
        """The second process of `scripted`."""
        found = tenants.restarted(
            self._plan(run_id), self._engine, self._answer, model_id=self._model_id, folder=self._args.offload_path
        )
        print(json.dumps(found))
        return 0

    def _users(self, engine: Engine) -> list["_Row"]:
        document = _HANDBOOK.read_text(encoding="utf-8")
        talks = {user: [{"role": "system", "content": _SYSTEM + document}] for user, _ in _TURNS}
        rows = []
        for user, question in _TURNS:
            talks[user].append({"role": "user", "content": question})
            prompt = self._tokenizer.apply_chat_template(talks[user])
            _tell(self._args, f"\n{user}: {question}")
            warm = self._answer(engine, prompt)
            [cold] = engine.generate(
                [prompt], self._args.max_tokens, reuse=False, seed=self._args.seed, ignore_eos=self._args.ignore_eos
            )
            talks[user].append({"role": "assistant", "content": self._text(warm)})
            rows.append(_Row(user, warm, cold))
        return rows

    def _plan(self, run_id: str) -> tenants.Plan:
        system = {"role": "system", "content": _SYSTEM + _HANDBOOK.read_text(encoding="utf-8")}
        return tenants.Plan(
            [
                self._tokenizer.apply_chat_template([system, {"role": "user", "content": question}])
                for question in tenants.QUESTIONS
            ],
            self._args.max_tokens,
            self._args.block_size,
            self._args.host_blocks,
            self._args.disk_budget,
            run_id,
        )

    def _engine(self, num_blocks: int, tiers: Mapping[str, Any]) -> Engine:
        args = self._args
        engine = Engine(
            self._model,
            block_size=args.block_size,
            num_blocks=num_blocks,
            dtype=args.dtype,
            sampler=self._sampler,
            tiers=tiers,
            metrics=self._metrics,
        )
        _tell(args, f"compiled in {engine.compile_seconds:.1f} s")
        return engine

    def _tiers(self) -> dict[str, Any]:
        """The tiers of a talk: those that options ask for."""
        args = self._args
        host = args.host_blocks or 0
        disk = (tenants.DISK_BUDGET if args.offload_path else 0) if args.disk_budget is None else args.disk_budget
        if not host and not disk:
            return {}
        tiers = {"enable_offload": True, "host_blocks": host, "disk_budget": disk, "model_id": self._model_id}
        return tiers | ({"offload_path": args.offload_path} if args.offload_path else {})

    def _options(self) -> list[str]:
        """The command line that gives a second process what this one has."""
        args = self._args
        options = ["--json"] + (["--ignore-eos"] if args.ignore_eos else [])
        for name in ("max_tokens", "temperature", "top_p", "seed", "block_size", "host_blocks", "disk_budget", "dtype"):
            if getattr(args, name) is not None:
                options += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        return options

    def _answer(self, engine: Engine, prompt: Sequence[int], salt: str = "") -> Completion:
        """Answers a prompt, streaming to the terminal unless JSON is asked for, with a line of figures."""
        decoder = StreamDecoder(self._tokenizer)
        shown = 0
        completion = Completion(list(prompt), self._args.max_tokens)
        for [completion] in engine.stream(
            [prompt], self._args.max_tokens, salt=salt, seed=self._args.seed, ignore_eos=self._args.ignore_eos
        ):
            for token in completion.tokens[shown:]:
                piece = "" if token in self._tokenizer.special_ids else decoder.push(token)
                if not self._args.json:
                    print(piece, end="", flush=True)
            shown = len(completion.tokens)
        if not self._args.json:
            print(decoder.flush())
        _tell(
            self._args,
            f"  [prompt {len(prompt)} tokens, {_found(completion)}, {completion.num_prefilled} prefilled; "
            f"first token after {completion.ttft_seconds * 1e3:.0f} ms, then "
            f"{completion.decode_tokens_per_second:.1f} tokens/s]",
        )
        return completion

    def _text(self, completion: Completion) -> str:
        ids = [token for token in completion.tokens if token not in self._tokenizer.special_ids]
        return self._tokenizer.decode(ids)

    def _show_turns(self, rows: Sequence["_Row"]) -> None:
        lines = [
            "\nTime to first token, computed without reuse (cold) and with what the pool had (warm)\n",
            f"{'turn':>4}  {'user':<5} {'prompt':>6} {'cached':>6} {'cold ms':>8} {'warm ms':>8} {'ratio':>6}  answer",
        ]
        for number, row in enumerate(rows, start=1):
            cold, warm = row.cold.ttft_seconds, row.warm.ttft_seconds
            lines.append(
                f"{number:>4}  {row.user:<5} {len(row.warm.prompt):>6} {row.warm.num_cached:>6} {cold * 1e3:>8.0f} "
                f"{warm * 1e3:>8.0f} {cold / warm:>6.1f}  {_verdict(row.equal)}"
            )
        _tell(self._args, "\n".join(lines))

    def _show_tiers(self, rows: Sequence[tenants.Row]) -> None:
        lines = [
            "\nTime to first token by where the prefix was found (medians)\n",
            f"{'found in':<20} {'visits':>6} {'tokens found':>12} {'first token ms':>15} {'ratio':>6}  answer",
        ]
        lines += [
            f"{row.place:<20} {row.visits:>6} {row.found:>12} {row.ttft_seconds * 1e3:>15.0f} {row.speedup:>6.1f}  "
            f"{_verdict(row.equal)}"
            for row in rows
        ]
        _tell(self._args, "\n".join(lines))


@dataclasses.dataclass(frozen=True)
class _Row:
    """One turn of the scripted session."""

    user: str
    warm: Completion
    cold: Completion

    @property
    def equal(self) -> bool:
        return self.warm.tokens == self.cold.tokens

    def as_dict(self) -> dict[str, object]:
        return {
            "user": self.user,
            "prompt_tokens": len(self.warm.prompt),
            "hits": tenants.hits_of(self.warm),
            "prefilled": self.warm.num_prefilled,
            "ttft_cold_s": self.cold.ttft_seconds,
            "ttft_warm_s": self.warm.ttft_seconds,
            "decode_tokens_per_s": self.warm.decode_tokens_per_second,
            "output_token_ids": self.warm.tokens,
            "equal": self.equal,
        }


@contextlib.contextmanager
def _served(args: argparse.Namespace) -> Iterator[MetricsSink]:
    """Where managers measure: for a Prometheus server that collects it meanwhile, if a port is given."""
    if args.metrics_port is None:
        yield NullMetrics()
        return
    from kvbm_jax.monitoring.prometheus import PrometheusEndpoint  # noqa: PLC0415 (an extra)

    metrics = InMemoryMetrics()
    with PrometheusEndpoint(metrics, port=args.metrics_port) as endpoint:
        _tell(args, f"metrics at {endpoint.url}")
        yield metrics


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="chat.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--prompt", metavar="TEXT", help="answer one prompt")
    mode.add_argument("--interactive", action="store_true", help="talk on the terminal")
    parser.add_argument("--raw", action="store_true", help="with --prompt: no chat template around the text")
    parser.add_argument(
        "--max-tokens", type=at_least(1), default=48, metavar="N", help="bound of an answer (default 48)"
    )
    parser.add_argument("--ignore-eos", action="store_true", help="generate exactly --max-tokens")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 = greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X", help="nucleus to sample from (default 1)")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of the sampler (default 0)")
    parser.add_argument("--block-size", type=at_least(1), default=16, metavar="N", help="tokens a block (default 16)")
    parser.add_argument(
        "--num-blocks", type=at_least(1), default=512, metavar="N", help="size of the pool (default 512)"
    )
    parser.add_argument("--host-blocks", type=at_least(0), metavar="N", help="blocks of host memory below the pool")
    parser.add_argument("--offload-path", type=Path, metavar="DIR", help="folder of the disk tier, kept between runs")
    parser.add_argument("--disk-budget", type=at_least(0), metavar="BYTES", help="of the disk tier (default 2 GiB)")
    parser.add_argument("--restarted", metavar="RUN", help=argparse.SUPPRESS)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of weights and cache"
    )
    parser.add_argument(
        "--metrics-port", type=at_least(0), metavar="PORT", help="serve Prometheus metrics there while it runs; 0: any"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line of stdout")
    return parser


def _found(completion: Completion) -> str:
    """Where the cached part of a prompt was."""
    places = {"g1": "device", "g2": "host", "g3": "disk"}
    found = [f"{count} from {places[tier]}" for tier, count in tenants.hits_of(completion).items() if count]
    return f"{completion.num_cached} cached" + (f" ({', '.join(found)})" if found else "")


def _verdict(equal: bool) -> str:
    return "equal" if equal else "DIFFERENT"


def _lines(prompt: str) -> Iterator[str]:
    """Lines typed by the user, until an empty one or the end of input."""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if not line:
            return
        yield line


def _tell(args: argparse.Namespace, line: str) -> None:
    """Prints for people: on stdout, or on stderr where stdout carries JSON."""
    print(line, file=sys.stderr if args.json else sys.stdout, flush=True)


if __name__ == "__main__":
    sys.exit(main())
