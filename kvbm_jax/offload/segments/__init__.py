"""G3 on Orbax: blocks in content-addressed segments, one checkpoint per batch of blocks.

record.py   what a segment says of itself, as bytes
folder.py   how a segment comes into its folder, is read, and goes
index.py    which block lies in which segment
store.py    the store: calls, threads, budget
report.py   what lies in a folder, for people
"""

from kvbm_jax.offload.segments.report import SegmentReport, inspect
from kvbm_jax.offload.segments.store import SegmentBlockStore

__all__ = ["SegmentBlockStore", "SegmentReport", "inspect"]
