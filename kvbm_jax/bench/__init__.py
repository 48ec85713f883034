"""Measurements of the library's own parts, each beside a baseline of the same run; `kvbm-jax bench` shows them.

timing.py   what a measurement is, and how it is taken
offload.py  the edges between device, host memory and disk
kernels.py  operations on cache arrays
hash.py     hashes of chained blocks
"""
