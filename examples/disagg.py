"""Disaggregated prefill and decode: one process computes long prompts, another answers them, on one NATS server.

    router ── long, not cached ──> prefill worker: computes the prompt, shares its blocks, is free for the next one
       └───── then, and all else ─> decode worker: pulls the blocks (G4), computes the last token, decodes

The router is this process. It knows what the workers hold from their events (`PrefixIndex`), and sends a prompt
straight to the decode worker where little of it is missing there: a detour would take longer than computing that. Every
answer is compared, token for token, with one that the decode worker computes without reuse; the exit status is 1 if one
differs.

    uv run examples/disagg.py
    uv run examples/disagg.py --transfer-engine tcp --short 64
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from options import at_least
from smollm2 import find_model, load_model, load_tokenizer, model_identity
from smollm2.engine import Engine

from kvbm_jax.events import PrefixIndex, Subscription
from kvbm_jax.hashing import hash_sequence
from kvbm_jax.transports.nats_connection import NatsConnection
from kvbm_jax.transports.nats_server import NatsServer
from kvbm_jax.transports.nats_subscriber import NatsKvEventSubscriberConfig, subscribe_nats

_BLOCK_SIZE = 16
_PATIENCE = 300.0  # seconds that a worker may take for anything
_HANDBOOK = Path(__file__).parent / "data" / "handbook.txt"
_PROMPTS = (
    "How high is the tower?",
    f"{_HANDBOOK.read_text()[:2400]}\n\nHow high is the tower?",
    f"{_HANDBOOK.read_text()[:2400]}\n\nOn which days is bread baked?",
    f"{_HANDBOOK.read_text()[2400:4800]}\n\nWhat is the text above about?",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs router or worker; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--max-tokens", type=at_least(1), default=12, metavar="N", help="of an answer")
    parser.add_argument("--short", type=at_least(0), default=48, metavar="N", help="tokens to compute where they are")
    parser.add_argument("--transfer-engine", choices=("auto", "nixl", "tcp"), default="auto")
    parser.add_argument("--worker", metavar="ID", help=argparse.SUPPRESS)
    parser.add_argument("--nats", metavar="URL", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    return work(args) if args.worker else route(args)


def work(args: argparse.Namespace) -> int:
    """A worker: reads requests as lines of JSON, answers each with a line."""
    path = find_model()
    model, _ = load_model(path, dtype=jnp.float32)
    tiers = {
        "enable_offload": True, "host_blocks": 512, "model_id": model_identity(path), "worker_id": args.worker,
        "events": "nats", "events_url": args.nats, "peers": "nats", "transfer_engine": args.transfer_engine,
    }  # fmt: skip
    with Engine(model, block_size=_BLOCK_SIZE, num_blocks=256, chunks=(16, 64, 256), tiers=tiers) as engine:
        _say(ready=True)
        for line in sys.stdin:
            request = json.loads(line)
            tokens = request["tokens"]
            if request["do"] == "prefill":
                engine.generate([tokens], 1, ignore_eos=True)
                _say(shared=engine.manager.share(tokens))
                continue
            if request.get("await"):
                _await(engine, tokens, request["await"])
            for (completion,) in engine.stream([tokens], args.max_tokens, reuse=request["do"] == "decode"):
                _say(tokens=completion.tokens, done=False)
            hits = {tier.label: count for tier, count in completion.hits.items() if count}
            _say(tokens=completion.tokens, done=True, hits=hits, ttft=completion.ttft_seconds)
    return 0


def _await(engine: Engine, tokens: list[int], wanted: int) -> None:
    """Waits until the worker has heard that a peer holds so much of a prompt; goes on without if it does not."""
    deadline = time.monotonic() + 5
    while sum(engine.manager.locate(tokens).values()) < wanted and time.monotonic() < deadline:
        time.sleep(0.005)


def _say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


class Worker:
    """A worker's process, as the router sees it."""

    def __init__(self, name: str, args: argparse.Namespace, url: str) -> None:
        command = [sys.executable, __file__, "--worker", name, "--nats", url, "--transfer-engine", args.transfer_engine]
        command += ["--max-tokens", str(args.max_tokens)]
        self.name = name
        self.waiting = 0  # requests under way: its load
        self._process = subprocess.Popen(  # noqa: S603 (this file, with arguments of its own)
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **request: Any) -> Iterator[dict[str, Any]]:
        """Sends a request and yields its answers; the last one has no `done`, or a true one."""
        assert self._process.stdin is not None
        self.waiting += 1
        print(json.dumps(request), file=self._process.stdin, flush=True)
        while True:
            answer = self.read()
            yield answer
            if answer.get("done", True):
                self.waiting -= 1
                return

    def read(self) -> dict[str, Any]:
        """Returns the next line that the worker says."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"worker {self.name} has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(_PATIENCE)
        finally:
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()


def route(args: argparse.Namespace) -> int:
    """Starts a server and two workers, and sends them prompts."""
    tokenizer = load_tokenizer(find_model())
    index = PrefixIndex()
    with contextlib.ExitStack() as opened:
        folder = opened.enter_context(tempfile.TemporaryDirectory())
        os.environ["XDG_RUNTIME_DIR"] = folder  # where the workers' common token is
        server = opened.enter_context(NatsServer(Path(folder) / "nats"))
        events = subscribe_nats(NatsKvEventSubscriberConfig(connection=NatsConnection.from_url(server.url)))
        opened.callback(events.close)
        threading.Thread(target=_follow, args=(events, index), daemon=True).start()
        prefill, decode = (Worker(name, args, server.url) for name in ("prefill", "decode"))
        for worker in (prefill, decode):
            opened.callback(worker.close)
        for worker in (prefill, decode):
            worker.read()
        print(f"{'prompt':>6}  {'way':16}  {'found in':24}  {'first token ms':>14}  {'alone ms':>8}  answer")
        equal = True
        for text in _PROMPTS:
            tokens = tokenizer.apply_chat_template([{"role": "user", "content": text}])
            way, awaited = _choose(index, tokens, args.short), 0
            if way == "prefill, decode":
                (told,) = prefill.ask(do="prefill", tokens=tokens)
                awaited = min(told["shared"], (len(tokens) - 1) // _BLOCK_SIZE * _BLOCK_SIZE)
            *_, answer = decode.ask(do="decode", tokens=tokens, **{"await": awaited})
            *_, alone = decode.ask(do="alone", tokens=tokens)
            same = answer["tokens"] == alone["tokens"]
            equal &= same
            found = ", ".join(f"{tier} {count}" for tier, count in answer["hits"].items()) or "nowhere"
            print(
                f"{len(tokens):6}  {way:16}  {found:24}  {answer['ttft'] * 1e3:14.0f}  {alone['ttft'] * 1e3:8.0f}  "
                f"{'equal' if same else 'DIFFERENT'}: {tokenizer.decode(answer['tokens'])!r}",
                flush=True,
            )
    return 0 if equal else 1


def _follow(events: Subscription, index: PrefixIndex) -> None:
    for item in events:
        index.apply(item)


def _choose(index: PrefixIndex, tokens: list[int], short: int) -> str:
    """Where a prompt is computed: where it is answered if little of it is missing there."""
    overlaps = index.find_matches(hash_sequence(tokens, _BLOCK_SIZE))
    cached = max((overlap.blocks for holder, overlap in overlaps.items() if holder.worker_id == "decode"), default=0)
    return "decode" if len(tokens) - cached * _BLOCK_SIZE <= short else "prefill, decode"


if __name__ == "__main__":
    sys.exit(main())
