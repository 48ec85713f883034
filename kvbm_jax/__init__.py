"""A functional, block-based KV cache for JAX."""

__version__ = "0.1.0.dev0"
