"""Runs the moving operations on caches whose heads are shared out among 8 devices of a host; a process of its own.

Prints a JSON object: for each way and case the collectives in the compiled program, and whether results are those
without a mesh and stay shared out. Ways: "jit", on a mesh of automatic axes; "explicit", on one of explicit axes;
"shard_map", with and without its check of types; "kernel", by what shares out Mosaic kernels, a plain function in
place of a kernel.
"""

import json
import re
import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.cases import Scale, all_cases, cache_of, distinct, values
from kvbm_jax import kernels
from kvbm_jax.kernels.mosaic.heads import by_heads
from kvbm_jax.layout import KVLayout

H = 8  # no other axis of any array has this size
SIZES = {"block_size": 4, "num_kv_heads": H, "head_dim": 16}
SCALE = Scale(2, 14, tokens=6, blocks=5, rows=4, shapes={"sharded": SIZES})
QUICK = (
    "store_kv, sharded",
    "load_kv, sharded",
    "gather_blocks, sharded, layer_separate to universal",
    "scatter_blocks, sharded, universal to layer_separate",
    "copy_blocks, sharded, layer_stacked, any",
    "permute_blocks, sharded, layer_separate to universal",
)
COLLECTIVES = re.compile(r"\b(all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|reduce-scatter)")


def spec(array):
    return P(*("heads" if size == H else None for size in array.shape))


def shared(tree, mesh):
    return jax.tree.map(lambda array: jax.device_put(array, NamedSharding(mesh, spec(array))), tree)


def told(function, arguments, expected, mesh):
    """What came of a function of arguments that are shared out."""
    program = jax.jit(function).lower(*shared(arguments, mesh)).compile()
    results = jax.tree.leaves(program(*shared(arguments, mesh)))
    equal = all(np.array_equal(*pair) for pair in zip(results, jax.tree.leaves(expected), strict=True))
    stay = all(result.sharding.shard_shape(result.shape) != result.shape for result in results)
    return {"collectives": COLLECTIVES.findall(program.as_text()), "equal": equal, "shared": stay}


def as_kernel():
    """Storing and gathering by rule of the partitioner, and what it has to equal."""
    layout = KVLayout(2, 14, dtype="float32", **SIZES)
    (array, other), rows = cache_of(1, layout), values(3, (6, H, 16), "float32")
    slots, ids = distinct(1, layout.num_slots, 6), distinct(1, 14, 5)

    def store(array, slots, *rows):
        return (kernels.store_kv(array, rows, slots, implementation="xla"),)

    def gather(ids, *arrays):
        local = KVLayout(2, 14, 4, arrays[0].shape[3], 16, "float32")
        return (kernels.gather_blocks(arrays, local, ids, implementation="xla"),)

    yield (
        "store_kv",
        store,
        lambda a, s, *r: by_heads(store, [(a, "NCTHD"), (s, "S"), (r[0], "SHD"), (r[1], "SHD")], ["NCTHD"]),
        (array, slots, rows, rows),
    )
    yield (
        "gather_blocks",
        gather,
        lambda i, *a: by_heads(gather, [(i, "M"), *((each, "NCTHD") for each in a)], ["MLCTHD"]),
        (ids, array, other),
    )


def main(every):
    automatic, explicit = (
        jax.make_mesh((2, 4), ("data", "heads"), axis_types=(kind,) * 2) for kind in (AxisType.Auto, AxisType.Explicit)
    )
    found = {}
    for case in all_cases(SCALE):
        if not case.heads or not (every or case.name in QUICK):
            continue
        function, arguments = case.function(None), jax.jit(case.arguments)(0)
        expected = jax.jit(function)(*arguments)
        found[f"jit: {case.name}"] = told(function, arguments, expected, automatic)
        with jax.set_mesh(explicit):
            found[f"explicit: {case.name}"] = told(function, arguments, expected, explicit)
        specs = [jax.tree.map(spec, tree) for tree in (arguments, expected)]
        for check in (True, False):
            mapped = jax.shard_map(local(case), mesh=automatic, in_specs=specs[0], out_specs=specs[1], check_vma=check)
            found[f"shard_map, {check}: {case.name}"] = told(mapped, arguments, expected, automatic)
    for name, plain, function, arguments in as_kernel():
        found[f"kernel: {name}"] = told(function, arguments, jax.jit(plain)(*arguments), automatic)
        with jax.set_mesh(explicit):
            found[f"kernel, explicit: {name}"] = told(function, arguments, jax.jit(plain)(*arguments), explicit)
    print(json.dumps(found))


def local(case):
    """The same case for a device's share of the heads: its layout has that many."""
    sizes = SIZES | {"num_kv_heads": H // 4}
    shares = all_cases(Scale(2, 14, tokens=6, blocks=5, rows=4, shapes={"sharded": sizes}))
    return next(share for share in shares if share.name == case.name).function(None)


if __name__ == "__main__":
    main(sys.argv[1] == "every")
