"""The arithmetic of a stage as operations on packed sequences: a torch twin each, and a Triton kernel for GPUs.

`x.py` holds the operation: it chooses by device between `x_torch`, the definition of truth, and `x_triton` in
`x_kernel.py`, which alone imports triton. LIGHTKV_OPS=torch or =triton in the environment overrides the choice.
"""
