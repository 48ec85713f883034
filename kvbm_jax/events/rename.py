"""An engine's names for blocks, put into ours.

Engines hash in their own way, so what vLLM calls a block says nothing to who asks by our hashes, and a block that an
engine has on the device and the manager below it would pass for two. A `Renamer` stands before a consolidator's source,
takes the engine's decoded batches, and hashes each block anew from its tokens, its LoRA name and its parent, whose name
it knows:

    engine's stream → EngineCodec.decode → Renamer → Consolidator.source("engine")

A block that comes without tokens has the name that it had in another tier. One whose parent is not known, for it was
announced before the renamer listened, is left out and counted. What an engine mixes into its hashes and does not tell,
images and salts, is missing in ours: two prompts that differ in it alone become one. Give such streams a renamer for
each salt, or none.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from kvbm_jax.events.rows import NO_PARENT, BlockContent, EventRow, RowPublisher, rows_of
from kvbm_jax.events.schema import EventType, KvEventBatch
from kvbm_jax.hashing import HashAlgorithm, hash_block, hash_bytes
from kvbm_jax.protocols import BlockKey, EventSink

__all__ = ["Renamer"]


class _Named(NamedTuple):
    """A block of the engine under our name."""

    key: BlockKey
    content: BlockContent
    tiers: set[int]  # where the engine has it


class Renamer:
    """An event sink that passes on an engine's batches under our hashes; for one thread.

    Args:
      sink: Takes what is renamed. Closed by `close`.
      algorithm: How we hash.
      salt: That the engine's requests have with us.
    """

    def __init__(
        self, sink: EventSink[KvEventBatch], *, algorithm: HashAlgorithm = HashAlgorithm.BLAKE3, salt: str = ""
    ) -> None:
        self.left_out = 0  # creations whose parent, or whose tokens, are not known
        self._out = RowPublisher(sink)
        self._algorithm = algorithm
        self._salt = salt
        self._ranks: dict[int, dict[BlockKey, _Named]] = {}  # by the engine's names

    def publish(self, batch: KvEventBatch, /) -> None:
        """Passes on what of a batch has a name with us, under ids of its own."""
        blocks = self._ranks.setdefault(batch.dp_rank, {})
        rows = [named for row in rows_of(batch) for named in self._rename(blocks, row)]
        self._out.publish(rows, worker_id=batch.worker_id, dp_rank=batch.dp_rank)

    def close(self) -> None:
        """Closes the sink."""
        self._out.close()

    def _rename(self, blocks: dict[BlockKey, _Named], row: EventRow) -> Iterator[EventRow]:
        if row.event_type is EventType.CLEARED:
            for key in list(blocks):
                _leave(blocks, key, row.tier)
            yield row
            return
        named = blocks.get(row.key)
        if named is None and row.content is not None:
            named = self._name(blocks, row, row.content)
            self.left_out += named is None
        if named is None:
            return
        if row.content is None:
            _leave(blocks, row.key, row.tier)
            yield row._replace(key=named.key)
        else:
            blocks[row.key] = named
            named.tiers.add(row.tier)
            named.tiers.discard(row.from_tier)
            yield row._replace(key=named.key, content=named.content)

    def _name(self, blocks: dict[BlockKey, _Named], row: EventRow, content: BlockContent) -> _Named | None:
        """Hashes a block anew; None if that cannot be."""
        parent = None if row.parent is None else blocks.get(row.parent)
        if not content.tokens or (row.parent is not None and parent is None):
            return None
        words = hash_block(
            np.frombuffer(content.tokens, "<u4").astype(np.uint32),
            algorithm=self._algorithm,
            salt=self._salt,
            lora_name=content.lora_name,
            parent=None if parent is None else np.frombuffer(parent.key.sequence_hash, "<u4").astype(np.uint32),
        )
        before = NO_PARENT if parent is None else parent.key.sequence_hash
        key = BlockKey(hash_bytes(words), row.key.group_idx)
        return _Named(key, content._replace(parent_hash=before), set())


def _leave(blocks: dict[BlockKey, _Named], key: BlockKey, tier: int) -> None:
    """Notes that the engine has a block in a tier, or with 0 in any, no more."""
    named = blocks[key]
    named.tiers.discard(tier)
    if not tier or not named.tiers:
        del blocks[key]
