"""The cache tensors: storing, loading and moving keys and values by slot and by block.

A `KVCache` is a pytree of the arrays that its layout describes. Verbs return a new cache; under a jit that donates the
old one they work in place, whatever the size of the cache. The pool says which block is whose; nothing here does.

For models that scan over layers, `layer` may be a traced i32[] when the layout is `layer_stacked`; carry the cache
through the scan as carry, never as xs and ys.


Arrays may be shared out by kv heads among the devices of a mesh; each device then works on its own. Within a `shard_map`
the layout is that of one device's heads.
