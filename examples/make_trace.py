"""Writes a synthetic request trace in Mooncake's format, for `kvbm-jax replay`.

Users hold conversations: each request repeats its conversation so far and adds to it, and all conversations of one
application begin with the same system prompt.

    uv run examples/make_trace.py trace.jsonl --requests 2000
"""

import argparse
import itertools
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from options import at_least


def conversations(requests: int, *, users: int, applications: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yields requests, each with ids of its 512-token blocks; an equal id means an equal whole prefix."""
    rng = random.Random(seed)
    fresh = itertools.count()
    prompts = [[next(fresh) for _ in range(rng.randint(2, 12))] for _ in range(applications)]
    talks: list[list[int]] = [[] for _ in range(users)]
    clock = 0.0
    for _ in range(requests):
        clock += rng.expovariate(1 / 300)
        user = min(int(rng.paretovariate(0.8)) - 1, users - 1)
        if not talks[user] or rng.random() < 0.15 or len(talks[user]) > 240:
            talks[user] = list(rng.choice(prompts))
        talks[user] = talks[user] + [next(fresh) for _ in range(rng.randint(1, 6))]
        yield {
            "timestamp": round(clock),
            "input_length": 512 * len(talks[user]) - rng.randrange(512),
            "output_length": rng.randint(1, 1000),
            "hash_ids": talks[user],
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the file and says how large it is."""
    parser = argparse.ArgumentParser(prog="make_trace.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("path", type=Path)
    for name, default in (("requests", 2000), ("users", 200), ("applications", 5)):
        parser.add_argument(f"--{name}", type=at_least(1), default=default, metavar="N", help=f"default {default}")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    args = parser.parse_args(argv)
    rows = conversations(args.requests, users=args.users, applications=args.applications, seed=args.seed)
    refs = 0
    try:
        with args.path.open("w", encoding="utf-8") as file:
            for row in rows:
                refs += len(row["hash_ids"])
                file.write(json.dumps(row) + "\n")
    except OSError as error:
        parser.error(f"cannot write {args.path}: {error.strerror}")
    print(f"{args.path}: {args.requests} requests, {refs} block references")
    return 0


if __name__ == "__main__":
    sys.exit(main())
