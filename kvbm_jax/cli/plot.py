"""A picture of a comparison of replays: hit rate over pool size, a line for each policy. Needs the extra `plot`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvbm_jax.errors import ConfigError
from kvbm_jax.extras import needs

if TYPE_CHECKING:
    from kvbm_jax.replay import ComparedReplay

__all__ = ["draw", "require"]


def require(path: Path) -> None:
    """Sees to it, before anything long is begun, that a picture can be drawn into the file.

    Raises:
      MissingDependencyError: if matplotlib is not installed.
      ConfigError: if the folder is not there, or the ending names no kind of picture that matplotlib draws.
    """
    with needs("plot", "--plot"):
        from matplotlib.backend_bases import FigureCanvasBase  # noqa: PLC0415
    if not path.parent.is_dir():
        raise ConfigError(f"cannot draw {path}: there is no folder {path.parent}")
    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in kinds:
        raise ConfigError(f"cannot draw {path}: its name must end in one of {', '.join(f'.{kind}' for kind in kinds)}")


def draw(path: Path, rows: Sequence["ComparedReplay"]) -> None:
    """Draws the hit rates of a comparison.

    Raises:
      ConfigError: if the file cannot be written.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import PercentFormatter, StrMethodFormatter  # noqa: PLC0415

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for policy in dict.fromkeys(row.policy for row in rows):
        points = sorted((row.num_blocks, row.result.hit_rate) for row in rows if row.policy == policy)
        axes.plot(*zip(*points, strict=True), marker="o", label=policy)
    sizes = sorted({row.num_blocks for row in rows})
    if len(sizes) > 1:
        axes.set_xscale("log")
    axes.set_xticks(sizes, minor=False)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("blocks of the pool")
    axes.set_ylabel("hit rate")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"cannot draw {path}: {error.strerror or error}") from error
