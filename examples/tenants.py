"""The second half of the scripted chat: ten tenants share a device pool that has room for one of them.

Every tenant asks about the same document under a salt of its own, so nothing is shared: what one leaves in the pool is
evicted by the next, to host memory and on to disk. Then some come back, from each place, and at last a second process
on the same folder serves tenants that it has never seen. A returning tenant must get the answer that was computed for
it at first, token for token.
"""

import dataclasses
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smollm2.engine import Completion, Engine

from kvbm_jax.errors import KvbmError
from kvbm_jax.protocols import Tier

__all__ = [
    "DISK_BUDGET",
    "QUESTIONS",
    "Plan",
    "Row",
    "SecondProcessError",
    "drop_file_cache",
    "hits_of",
    "new_run_id",
    "restarted",
    "run",
    "second_process",
]

DISK_BUDGET = 2 << 30  # bytes, where nothing else is asked for
QUESTIONS = (
    "How high is the tower?",
    "What is the name of the supply boat?",
    "On which days is bread baked?",
    "Who built the tower?",
    "How long does the crossing take?",
    "How many steps has the stair?",
    "What colour is the log book?",
    "How many litres of water may each person use a day?",
    "Who is the skipper of the supply boat?",
    "How often does the light flash?",
)
_LAST, _FROM_HOST, _FROM_DISK, _AFTER_RESTART = 9, (8, 7, 6), (0, 1, 2), (3, 4)


class SecondProcessError(KvbmError, RuntimeError):
    """The second process failed; what it had to say is on stderr."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What both processes must agree on."""

    prompts: Sequence[Sequence[int]]  # one for each tenant
    max_tokens: int
    block_size: int
    host_blocks: int | None  # None: four tenants
    disk_budget: int | None  # bytes; None: `DISK_BUDGET`
    run_id: str  # makes the salts of one run its own

    @property
    def tenant_blocks(self) -> int:
        """Blocks of one tenant, its answer included: a tenth of all of them, and the size of the device pool."""
        return -(-(max(map(len, self.prompts)) + self.max_tokens) // self.block_size)

    def tiers(self, folder: Path, model_id: str) -> dict[str, Any]:
        """The keys of the configuration for the tiers below the device."""
        return {
            "enable_offload": True,
            "offload_path": folder,
            "host_blocks": 4 * self.tenant_blocks if self.host_blocks is None else self.host_blocks,
            "disk_budget": DISK_BUDGET if self.disk_budget is None else self.disk_budget,
            "model_id": model_id,
        }

    def salt(self, tenant: int) -> str:
        """What keeps a tenant's blocks its own."""
        return f"tenant {tenant} of {self.run_id}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: visits that found their prefix in the same place."""

    place: str
    ttft_seconds: float  # median
    speedup: float  # over cold, by medians
    found: int  # prompt tokens, mean
    visits: int
    equal: bool

    def as_dict(self) -> dict[str, object]:
        """The row as JSON."""
        return dataclasses.asdict(self)


type MakeEngine = Callable[[int, Mapping[str, Any]], Engine]
"""Makes an engine from the blocks of its pool and the keys of the tiers below."""

type Ask = Callable[[Engine, Sequence[int], str], Completion]
"""Answers a prompt under a salt, showing what people want to see."""


def run(
    plan: Plan,
    make_engine: MakeEngine,
    ask: Ask,
    tell: Callable[[str], None],
    *,
    model_id: str,
    folder: Path | None,
    restart: Sequence[str],
) -> list[Row]:
    """Runs the session.

    Args:
      plan: what is asked.
      make_engine: makes the engine.
      ask: answers.
      tell: prints a line for people.
      model_id: names the model to the disk tier.
      folder: of the disk tier; None for one that is deleted afterwards.
      restart: the command that runs `restarted` in a second process, without the folder.

    Returns:
      The table, cold first.

    Raises:
      SecondProcessError: if the second process failed.
    """
    with _folder(folder) as place:
        tiers = plan.tiers(place, model_id)
        tell(
            f"\nTen tenants of up to {plan.tenant_blocks} blocks; the device pool has {plan.tenant_blocks}, "
            f"host memory {tiers['host_blocks']}, the disk {tiers['disk_budget'] / 2**20:,.0f} MiB"
        )
        with make_engine(plan.tenant_blocks, tiers) as engine:

            def visit(tenant: int) -> Completion:
                tell(f"\nTenant {tenant}: {QUESTIONS[tenant]}")
                return ask(engine, plan.prompts[tenant], plan.salt(tenant))

            first = [visit(tenant) for tenant in range(len(QUESTIONS))]
            visits = {"device": {_LAST: visit(_LAST)}, "host": {}, "disk": {}}
            visits["host"] = {tenant: visit(tenant) for tenant in _FROM_HOST}
            engine.manager.flush()
            for tenant in _FROM_DISK:
                drop_file_cache(place)
                visits["disk"][tenant] = visit(tenant)
        tell("\nThe first process has brought its cache to disk; a second one starts on the same folder.")
        after_restart = second_process([*restart, "--offload-path", str(place)])
    visits["disk, after restart"] = {
        answer["tenant"]: Completion(
            list(plan.prompts[answer["tenant"]]),
            plan.max_tokens,
            hits={Tier[name.upper()]: count for name, count in answer["hits"].items()},
            tokens=answer["output_token_ids"],
            ttft_seconds=answer["ttft_s"],
        )
        for answer in after_restart
    }
    return [_row("nowhere (cold)", dict(enumerate(first)), first)] + [
        _row(place, answers, first) for place, answers in visits.items()
    ]


def second_process(command: Sequence[str]) -> list[dict[str, Any]]:
    """Runs the command that runs `restarted`; returns its answers.

    Raises:
      SecondProcessError: if it failed.
    """
    done = subprocess.run(  # noqa: S603 (this program itself)
        command, capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise SecondProcessError(f"the second process ended with status {done.returncode}")
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])["answers"]
    return found


def restarted(plan: Plan, make_engine: MakeEngine, ask: Ask, *, model_id: str, folder: Path) -> dict[str, object]:
    """What the second process does: answers tenants of the first one; returns the answers for JSON."""
    answers = []
    with make_engine(plan.tenant_blocks, plan.tiers(folder, model_id)) as engine:
        for tenant in _AFTER_RESTART:
            drop_file_cache(folder)
            answer = ask(engine, plan.prompts[tenant], plan.salt(tenant))
            answers.append(
                {
                    "tenant": tenant,
                    "hits": hits_of(answer),
                    "ttft_s": answer.ttft_seconds,
                    "output_token_ids": answer.tokens,
                }
            )
    return {"answers": answers}


def new_run_id() -> str:
    """Returns a name that no other run has."""
    return secrets.token_hex(4)


def hits_of(answer: Completion) -> dict[str, int]:
    """Prompt tokens found, by tier, as JSON names them."""
    return {tier.label: answer.hits.get(tier, 0) for tier in (Tier.G1, Tier.G2, Tier.G3)}


def drop_file_cache(folder: Path) -> None:
    """Has the system forget what it keeps of files, so that they are read from the disk itself."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(file)


def _row(place: str, answers: Mapping[int, Completion], first: Sequence[Completion]) -> Row:
    cold = statistics.median(answer.ttft_seconds for answer in first)
    seconds = statistics.median(answer.ttft_seconds for answer in answers.values())
    return Row(
        place,
        seconds,
        cold / seconds,
        round(statistics.mean(answer.num_cached for answer in answers.values())),
        len(answers),
        all(answer.tokens == first[tenant].tokens for tenant, answer in answers.items()),
    )


@contextmanager
def _folder(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="kvbm-chat-") as name:
        yield Path(name)
