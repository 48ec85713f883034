"""What running sequences do between their beginning and their end: grow, become findable, part, go back, end.

See `BlockManager` for the methods, what they raise included. Here is the order of things: tails are copied before they
are written, what ends is registered before it is released, and a handle changes once its blocks have.
"""

import collections
from collections import abc
from dataclasses import replace

import numpy as np

from kvbm_jax.device_tier import DeviceTier
from kvbm_jax.errors import BlockStateError
from kvbm_jax.handles import Sequence
from kvbm_jax.hashing import check_tokens
from kvbm_jax.policies import check_priority
from kvbm_jax.roster import Roster
from kvbm_jax.types import Status

__all__ = ["Progress"]


class Progress:
    """Moves running sequences on.

    Args:
      device: holds their blocks.
      roster: knows which run.
    """

    def __init__(self, device: DeviceTier, roster: Roster) -> None:
        self._device = device
        self._roster = roster

    def register(self, seq: Sequence, num_computed: int | None = None, priority: int | None = None) -> int:
        """Makes whole computed blocks findable, with a priority of their own or that of their sequence.

        Returns:
          How many blocks others could not find before.
        """
        chosen = seq.priority if priority is None else check_priority(priority)
        self._roster.require(seq)
        size, slots = self._device.layout.block_size, self._device.pool.length(seq.row)
        computed = slots if num_computed is None else num_computed
        if not 0 <= computed <= slots:
            raise BlockStateError(f"{computed} tokens cannot be computed in a sequence that has {slots} slots")
        first, last = seq.num_registered, computed // size
        if last <= first or not seq.reuse:
            return 0
        done = self._device.pool.register(seq.row, seq.hash_blocks(last)[first:], first, chosen)
        seq.num_registered = last
        index = first + np.flatnonzero(done.new)
        if len(index):
            blocks = zip(index, done.block_ids[done.new], strict=True)
            self._device.residency.registered([seq.resident(int(i), int(block)) for i, block in blocks])
        return len(index)

    def extend(self, tokens: abc.Mapping[Sequence, abc.Sequence[int]]) -> None:
        """Appends tokens and gives them slots."""
        counts = np.zeros((self._roster.max_sequences,), np.int32)
        added = {seq: check_tokens(new).tolist() for seq, new in tokens.items()}
        for seq, new in added.items():
            self._roster.require(seq)
            counts[seq.row] = len(new)
        self.unshare([seq for seq, new in added.items() if new])
        most = -(-int(counts.max(initial=0)) // self._device.layout.block_size) + 1
        statuses = self._device.extend(counts, most)
        for seq, new in added.items():
            if statuses[seq.row] == Status.OK:
                seq.tokens.extend(new)
        for row, status in enumerate(statuses):
            self._device.pool.require(status, blocks=most, row=row)

    def step(
        self, tokens: abc.Mapping[Sequence, abc.Sequence[int]], ending: abc.Sequence[Sequence]
    ) -> dict[Sequence, int]:
        """Registers, ends and extends in one compiled call; returns the blocks newly findable of each that goes on."""
        added = {seq: check_tokens(new).tolist() for seq, new in tokens.items()}
        for seq in (*added, *ending):
            self._roster.require(seq)
        if len({*added, *ending}) < len(added) + len(ending):
            raise BlockStateError("a sequence is named twice; end it, or extend it")
        size, pool = self._device.layout.block_size, self._device.pool
        growth = {seq.row: len(new) for seq, new in added.items()}
        most = max(pool.lacking(growth), default=0)
        for seq in ending:
            self.register(seq)
        growing = [seq for seq, new in added.items() if new]
        if any(seq.may_share_tail for seq in growing):
            # Tails are copied before the step, but may need the blocks of what has ended.
            for seq in ending:
                self.release(seq)
            ending = ()
            self.unshare(growing)

        first = {seq: seq.num_registered for seq in added}
        last = {seq: max(pool.length(seq.row) // size if seq.reuse else 0, first[seq]) for seq in added}
        complete = [(seq, i) for seq in added for i in range(first[seq], last[seq])]
        hashes = [seq.hash_blocks(last[seq])[first[seq] :] for seq in added if last[seq] > first[seq]]
        stepped = self._device.step(
            {seq.row: seq.hashes[: seq.num_registered] for seq in ending},
            growth,
            [(seq.row, i) for seq, i in complete],
            np.concatenate(hashes) if hashes else np.zeros((0, 4), np.uint32),
            most,
            [seq.priority for seq, _ in complete],
        )
        for seq in ending:
            self._roster.leave(seq)
        for seq, status in zip(added, stepped.statuses, strict=True):
            if status == Status.OK:
                seq.tokens.extend(added[seq])
        refused = {seq for (seq, _), done in zip(complete, stepped.done, strict=True) if not done}
        for seq in added.keys() - refused:
            seq.num_registered = last[seq]
        named = zip(complete, stepped.block_ids, stepped.new, strict=True)
        news = [(seq, seq.resident(i, int(block))) for (seq, i), block, new in named if new]
        if news:
            self._device.residency.registered([resident for _, resident in news])
        found = dict.fromkeys(added, 0) | collections.Counter(seq for seq, _ in news)
        for seq in refused:
            found[seq] += self.register(seq)
        self._device.update_gauges()
        for seq, status in zip(added, stepped.statuses, strict=True):
            pool.require(status, blocks=-(-len(added[seq]) // size), row=seq.row)
        return found

    def fork(self, seq: Sequence) -> Sequence:
        """Begins a copy that shares all blocks."""
        self._roster.require(seq)
        row = self._roster.free_row()
        self._device.pool.fork(seq.row, row)
        copy = replace(seq, tokens=list(seq.tokens), may_share_tail=True)
        seq.may_share_tail = True
        self._roster.enter(copy, row)
        self._device.update_gauges()
        return copy

    def trim(self, seq: Sequence, num_tokens: int) -> None:
        """Rolls a sequence back to its first `num_tokens` tokens."""
        self._roster.require(seq)
        length = self._device.pool.length(seq.row)
        if not 0 <= num_tokens <= length:
            raise BlockStateError(f"a sequence of {length} tokens cannot be rolled back to {num_tokens}")
        self._device.pool.trim(seq.row, num_tokens)
        whole = num_tokens // self._device.layout.block_size
        del seq.tokens[num_tokens:]
        seq.hashes = seq.hashes[:whole]
        seq.num_cached = min(seq.num_cached, num_tokens)
        seq.num_registered = min(seq.num_registered, whole)
        seq.may_share_tail = True
        self._device.update_gauges()

    def release(self, seq: Sequence) -> None:
        """Ends a sequence."""
        self._roster.require(seq)
        self._device.release(seq.row, seq.hashes[: seq.num_registered])
        self._roster.leave(seq)

    def unshare(self, growing: abc.Sequence[Sequence]) -> None:
        """Copies the tails of sequences that are about to be written where others hold them too."""
        rows = [seq.row for seq in growing if seq.may_share_tail]
        if not rows:
            return
        self._device.unshare(rows)
        for seq in growing:
            seq.may_share_tail = False
