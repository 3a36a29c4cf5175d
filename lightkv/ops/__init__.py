"""Operations on packed sequences, each as a torch twin and as a Triton kernel for GPUs.

`x.py` holds the operation x and its twin `x_torch`, which defines the result. `x_kernel.py` holds the Triton form,
`x_triton`, and is the only file of the two that imports triton. The operation chooses between them by device;
LIGHTKV_OPS=torch or =triton in the environment overrides the choice.
"""
