"""Runs of like events: how a batch of one event a block becomes messages of many blocks.

The dialects of engines and routers say "these blocks, each the child of the one before, are stored" in one event. A run
is a stretch of a batch that fits one such event.
"""

import itertools
from typing import NamedTuple

import numpy as np

from kvbm_jax.events.schema import EventType, KvEventBatch
from kvbm_jax.protocols import Tier

__all__ = ["Run", "runs"]

_TYPES = tuple(EventType)
_TIERS = (None, *Tier)
_CREATED, _MIGRATED = EventType.CREATED.code, EventType.MIGRATED.code


class Run(NamedTuple):
    """Events `start` to `stop` of a batch, alike in all that is named here.

    Those that create blocks in a tier are a chain: the parent of each but the first is the block before it.
    """

    start: int
    stop: int
    event_type: EventType
    tier: Tier | None
    from_tier: Tier | None
    group_idx: int
    lora_name: str | None
    to_worker: str | None

    @property
    def stores(self) -> bool:
        """Whether blocks can be read in `tier` from now on."""
        return self.event_type is EventType.CREATED or (
            self.event_type is EventType.MIGRATED and self.to_worker is None
        )


def runs(batch: KvEventBatch) -> list[Run]:
    """Cuts a batch into runs, in order."""
    count = len(batch)
    if count == 0:
        return []
    if (shared := batch.shared) is not None:
        parents, hashes = batch.parent_hashes, batch.sequence_hashes
        if not _stores(shared.event_type) or parents[1:].tobytes() == hashes[:-1].tobytes():
            ends = [0, count]
        else:
            cut = (parents[1:] != hashes[:-1]).any(axis=1)
            ends = [0, *(np.flatnonzero(cut) + 1).tolist(), count]
        rest = (
            shared.event_type,
            _TIERS[shared.tier],
            _TIERS[shared.from_tier],
            shared.group_idx,
            shared.lora_name,
            None,
        )
        return [Run(start, stop, *rest) for start, stop in itertools.pairwise(ends)]
    if count == 1:
        return [_run(batch, 0, 1)]
    cut = np.zeros(count - 1, bool)
    for column in (batch.event_types, batch.tiers, batch.from_tiers, batch.group_idx):
        cut |= column[1:] != column[:-1]
    chains = (batch.event_types == _CREATED) | (batch.event_types == _MIGRATED)
    breaks = (batch.parent_hashes[1:] != batch.sequence_hashes[:-1]).any(axis=1)
    breaks |= np.diff(batch.token_offsets[1:]) != np.diff(batch.token_offsets[:-1])  # all with as many tokens
    cut |= breaks & chains[1:]
    for names in (batch.lora_names, batch.to_workers):
        if names:
            cut |= np.fromiter((a != b for a, b in itertools.pairwise(names)), bool, count - 1)
    ends = [0, *(np.flatnonzero(cut) + 1).tolist(), count]
    return [_run(batch, start, stop) for start, stop in itertools.pairwise(ends)]


def _stores(event_type: EventType) -> bool:
    return event_type is EventType.CREATED or event_type is EventType.MIGRATED


def _run(batch: KvEventBatch, start: int, stop: int) -> Run:
    return Run(
        start,
        stop,
        _TYPES[batch.event_types[start]],
        _TIERS[batch.tiers[start]],
        _TIERS[batch.from_tiers[start]],
        int(batch.group_idx[start]),
        batch.lora_names[start] if batch.lora_names else None,
        batch.to_workers[start] if batch.to_workers else None,
    )
