"""Kernels on arrays that are shared out by kv heads among the devices of a mesh.

XLA knows nothing of what a kernel does and would bring the whole of every operand to every device. No kernel looks
across heads, so each device does its own: by a rule for the partitioner, and where the sharding is part of the types of
the arrays (a mesh of explicit axes) by a `shard_map`. Within a `shard_map` arrays are a device's own already.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from kvbm_jax.kernels import target
from kvbm_jax.layout import KVLayout, LayoutKind

__all__ = ["by_heads", "letters_of", "share_of", "whole"]


def by_heads(
    function: Callable[..., tuple[jax.Array, ...]],
    arguments: Sequence[tuple[jax.Array, str]],
    results: Sequence[str],
) -> tuple[jax.Array, ...]:
    """Calls a function of arrays, on each device with its heads of them.

    The interpreter of kernels runs on one device: for it, that is a plain call.

    Args:
      function: works for any number of heads.
      arguments: arrays with the letters of their axes, H for heads; axes of one letter have one size. The first of
        them that has heads says which axis of the mesh they are shared out on.
      results: letters of the axes of the arrays that it returns.
    """
    arrays, axes = [array for array, _ in arguments], [letters for _, letters in arguments]

    def specs(heads: Any, sides: Sequence[str]) -> tuple[PartitionSpec, ...]:
        each = ((heads if axis == "H" else None for axis in letters) for letters in sides)
        return tuple(PartitionSpec(*spec) for spec in each)  # type: ignore[no-untyped-call]

    def heads_of(shardings: Sequence[Any]) -> Any:
        pairs = zip(shardings, axes, strict=True)
        return next((sharding.spec[letters.index("H")] for sharding, letters in pairs if "H" in letters), None)

    first, letters = next((array, letters) for array, letters in arguments if "H" in letters)
    if first.shape[letters.index("H")] == 1 or target.is_interpreting():
        return function(*arrays)
    typed = [jax.typeof(array).sharding for array in arrays]
    if (heads := heads_of(typed)) is not None:
        ours = jax.shard_map(function, in_specs=specs(heads, axes), out_specs=specs(heads, results), check_vma=False)
        return tuple(ours(*arrays))

    def partition(mesh: Any, given: Any, wanted: Any) -> tuple[Any, Any, Any, Any]:
        del wanted
        heads = heads_of([argument.sharding for argument in given])
        ways = [tuple(NamedSharding(mesh, spec) for spec in specs(heads, sides)) for sides in (results, axes)]
        return mesh, function, *ways

    # Factors of a rule are words in small letters; those that must not be shared out go in the order of appearance.
    rule = " -> ".join(", ".join(" ".join(letters.lower()) for letters in sides) for sides in (axes, results))
    others = tuple(axis for axis in dict.fromkeys("".join([*axes, *results]).lower()) if axis != "h")
    partitioned = custom_partitioning(function)  # type: ignore[no-untyped-call]
    partitioned.def_partition(  # type: ignore[no-untyped-call]
        partition, sharding_rule=rule, need_replication_factors=others
    )
    return tuple(partitioned(*arrays))


def letters_of(arrays: Sequence[jax.Array], layout: KVLayout, blocks: str = "N") -> list[tuple[jax.Array, str]]:
    """Returns the arrays of a cache, those of scales last, with the letters of their axes, `blocks` for that of blocks.

    A packed array comes as [N, R, P / R], R the runs of a block: one for each head if it is universal, else one of all
    heads, which is not shared out: on a mesh, quantised blocks are better universal.
    """
    if layout.is_packed:
        runs = layout.num_kv_heads if layout.kind is LayoutKind.UNIVERSAL else 1
        return [(array.reshape(array.shape[0], runs, -1), blocks + "HP") for array in arrays]
    axes = layout.axes.replace("N", blocks)
    return [(array, axes[: array.ndim]) for array in arrays]


def share_of(layout: KVLayout, array: jax.Array) -> KVLayout:
    """Returns the layout with the heads of a device, of which an array is given as `letters_of` has it."""
    if layout.is_packed:
        return replace(layout, num_kv_heads=array.shape[1]) if layout.kind is LayoutKind.UNIVERSAL else layout
    return replace(layout, num_kv_heads=array.shape[layout.axes.index("H")])


def whole(array: jax.Array, layout: KVLayout) -> jax.Array:
    """Returns an array as its layout says, given as `letters_of` has it."""
    return array.reshape(array.shape[0], -1) if layout.is_packed else array
