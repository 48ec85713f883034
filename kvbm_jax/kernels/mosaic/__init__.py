"""What the Mosaic GPU kernels share; the only place, with the `mosaic_gpu.py` of each operation, that knows Pallas.

pipeline   tiles through shared memory: loads ahead, stores behind, by the bulk copy engine
boxes      whole blocks between two arrays of any axes, by block id on either side
rows       rows of tokens between arrays of a step and slots of a cache
heads      arrays whose heads are shared out among devices
"""
