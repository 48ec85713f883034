"""Draining a worker: its answers go on, in the middle, in another process.

    this process ── answers two prompts ── hand_over("new") ──> is empty, and may end
    new worker   <── blocks pulled, last tokens computed anew ── goes on with both answers

Every answer is compared, token for token, with one that was not moved; the exit status is 1 if one differs.

    uv run examples/migrate.py
    uv run examples/migrate.py --transfer-engine tcp --max-tokens 64
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
from options import at_least
from smollm2 import find_model, load_model, load_tokenizer, model_identity
from smollm2.engine import Engine

from kvbm_jax.transports.nats_server import NatsServer

_PATIENCE = 300.0  # seconds that the new worker may wait for an answer to go on with
_HANDBOOK = Path(__file__).parent / "data" / "handbook.txt"
_PROMPTS = (
    "Write a few sentences about lighthouses.",
    f"{_HANDBOOK.read_text()[:1200]}\n\nWhat is the text above about? Tell all of it.",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the worker that is drained, or the new one; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--max-tokens", type=at_least(1), default=48, metavar="N", help="of an answer")
    parser.add_argument("--transfer-engine", choices=("auto", "nixl", "tcp"), default="auto")
    parser.add_argument("--nats", metavar="URL", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    return drain(args) if args.nats is None else go_on(args)


def open_engine(name: str, url: str, args: argparse.Namespace) -> Engine:
    """Returns a worker's engine."""
    path = find_model()
    model, _ = load_model(path, dtype=jnp.float32)
    tiers = {
        "enable_offload": True, "host_blocks": 256, "model_id": model_identity(path), "worker_id": name,
        "events": "nats", "events_url": url, "peers": "nats", "transfer_engine": args.transfer_engine,
    }  # fmt: skip
    return Engine(model, block_size=16, num_blocks=128, max_sequences=2, chunks=(16, 64, 256), tiers=tiers)


def go_on(args: argparse.Namespace) -> int:
    """The new worker: goes on with what it is handed, and says each answer as a line of JSON."""
    with open_engine("new", args.nats, args) as engine:
        print(json.dumps("ready"), flush=True)
        for _ in _PROMPTS:
            stream = engine.take_over(_PATIENCE)
            if stream is None:
                return 1
            *_, (completion,) = stream
            found = {tier.label: count for tier, count in completion.hits.items() if count}
            print(json.dumps({"tokens": completion.tokens, "found": found}), flush=True)
    return 0


def drain(args: argparse.Namespace) -> int:
    """Answers prompts, and hands them over in the middle."""
    tokenizer = load_tokenizer(find_model())
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in _PROMPTS]
    with contextlib.ExitStack() as opened:
        folder = opened.enter_context(tempfile.TemporaryDirectory())
        os.environ["XDG_RUNTIME_DIR"] = folder  # where the workers' common token is
        server = opened.enter_context(NatsServer(Path(folder) / "nats"))
        command = [sys.executable, __file__, "--nats", server.url, "--transfer-engine", args.transfer_engine]
        new = opened.enter_context(
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603 (this file, with its own arguments)
        )
        opened.callback(new.kill)
        assert new.stdout is not None
        engine = opened.enter_context(open_engine("old", server.url, args))
        alone = engine.generate(prompts, args.max_tokens, reuse=False)
        if not new.stdout.readline():
            raise SystemExit("the new worker has ended")
        stream = engine.stream(prompts, args.max_tokens)
        next(stream)
        completions = next(stream, [])  # some tokens further
        moved = engine.hand_over("new")
        stream.close()
        print(f"{moved} answers went on in another process; {engine.manager.num_running} run here", flush=True)
        equal = True
        for before, whole in zip(completions, alone, strict=True):
            answer = json.loads(new.stdout.readline())
            same = answer["tokens"] == whole.tokens
            equal &= same
            found = ", ".join(f"{tier} {count}" for tier, count in answer["found"].items()) or "nowhere"
            print(
                f"{len(before.prompt)} tokens of prompt, {len(before.tokens)} + "
                f"{len(answer['tokens']) - len(before.tokens)} of answer; found there: {found}; "
                f"{'equal' if same else 'DIFFERENT'}: {tokenizer.decode(answer['tokens'])!r}",
                flush=True,
            )
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
