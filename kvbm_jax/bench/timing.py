"""A measurement: something timed beside a baseline, in turns, so that what slows the machine slows both.

A trial is a function that prepares, does its work once, and cleans up; it returns the seconds of the work alone, from
its start until its result is there.
"""

import dataclasses
import statistics
from collections.abc import Callable

__all__ = ["Row", "Timing", "Trial"]

type Trial = Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement beside its baseline, both medians in seconds."""

    case: str
    seconds: float
    baseline: str  # what the baseline does, in words
    baseline_seconds: float

    @property
    def ratio(self) -> float:
        """Baseline's time over the case's: 1 is as fast as the baseline."""
        return self.baseline_seconds / self.seconds

    def as_dict(self) -> dict[str, str | float]:
        """Returns the row with its ratio, as `--json` prints it."""
        return {**dataclasses.asdict(self), "ratio": self.ratio}


@dataclasses.dataclass(frozen=True)
class Timing:
    """How measurements are taken.

    Attributes:
      repeats: Trials of either side that count, at least 1.
      progress: Is told in words what is under way.
    """

    repeats: int
    progress: Callable[[str], object]

    def compare(self, case: str, trial: Trial, baseline: str, baseline_trial: Trial) -> Row:
        """Runs both in turns and returns their medians; the first trial of each is to warm up and does not count."""
        pairs = []
        for i in range(self.repeats + 1):
            self.progress(f"{case}: {i} of {self.repeats}")
            pairs.append((trial(), baseline_trial()))
        times, baseline_times = zip(*pairs[1:], strict=True)
        return Row(case, statistics.median(times), baseline, statistics.median(baseline_times))
