"""The GPU that a program is traced for, and whether the Mosaic kernels can run there.

A device without hardware counts too: under `jax.sharding.use_abstract_mesh` with an `AbstractDevice` programs are
lowered and compiled for it, and in `interpreted()` kernels run on the CPU, slowly, as on an H100.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

__all__ = ["H100", "Target", "axes_refusal", "current", "interpreted", "is_interpreting", "refusal"]

_KINDS = (  # name of a device, in part, and its compute capability
    (r"H100|H200|H800|H20\b|GH200", (9, 0)),
    (r"B100|B200|B300", (10, 0)),
    (r"A100|A800|A30\b", (8, 0)),
)


class Target(NamedTuple):
    """A GPU."""

    kind: str
    capability: tuple[int, int]
    num_cores: int  # streaming multiprocessors


H100 = Target("NVIDIA H100 80GB HBM3", (9, 0), 132)
_interpreting = 0


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Runs the kernels of programs traced within it on the CPU, by Pallas's interpreter, as for an H100."""
    global _interpreting  # noqa: PLW0603 (the interpreter's own switch is global too)
    from jax.experimental.pallas import mosaic_gpu as plgpu  # noqa: PLC0415 (takes a second)

    _interpreting += 1
    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
            yield
    finally:
        _interpreting -= 1


def is_interpreting() -> bool:
    """Returns whether programs traced now are for the interpreter, which runs on one device."""
    return _interpreting > 0


def current() -> Target | None:
    """Returns the GPU that programs traced now run on; None if that is no NVIDIA GPU."""
    if is_interpreting():
        return H100
    if (abstract := jax.sharding.get_abstract_mesh().abstract_device) is not None:
        if abstract.platform not in ("gpu", "cuda"):
            return None
        return Target(abstract.device_kind, _capability(abstract.device_kind), abstract.num_cores or H100.num_cores)
    device = jax.config.jax_default_device
    if device is None or isinstance(device, str):
        device = jax.devices(device)[0]
    if device.platform != "gpu" or "NVIDIA" not in device.device_kind:
        return None
    major, _, minor = device.compute_capability.partition(".")
    return Target(device.device_kind, (int(major), int(minor or 0)), device.core_count)


def refusal() -> str | None:
    """Returns why no Mosaic kernel can serve programs traced now, or None."""
    target = current()
    if target is None:
        return "it needs an NVIDIA GPU"
    if target.capability < (9, 0):
        return (
            f"it needs the bulk copies of compute capability 9.0 (Hopper) or later; {target.kind} has "
            f"{target.capability[0]}.{target.capability[1]}"
        )
    return None


def axes_refusal(operands: Any) -> str | None:
    """Returns why no Mosaic kernel can take these operands, a pytree, for the mesh axes that they vary along, or None.

    Kernels write to references; within a `shard_map` that checks types, references to what varies are not to be had.
    """
    arrays = (leaf for leaf in jax.tree.leaves(operands) if isinstance(leaf, jax.Array))
    varying = {axis for array in arrays for axis in jax.typeof(array).manual_axis_type.varying}
    if not varying:
        return None
    return f"it is called in a shard_map over {', '.join(map(str, sorted(varying)))} that needs check_vma=False"


def _capability(kind: str) -> tuple[int, int]:
    """Of an abstract device, which does not say; (0, 0) for one that is not known here."""
    return next((capability for pattern, capability in _KINDS if re.search(pattern, kind)), (0, 0))
