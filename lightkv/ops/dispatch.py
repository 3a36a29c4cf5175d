"""Which form of an operation runs: the Triton kernel on CUDA devices that have Triton, the torch twin elsewhere."""

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from lightkv.errors import ConfigError

CHOICES = ("auto", "torch", "triton")


def use_triton(tensor: Tensor) -> bool:
    """True where the kernels should work on this tensor.

    Never in float64. LIGHTKV_OPS=torch switches them off; =triton asks for them everywhere, which on a CPU needs
    TRITON_INTERPRET=1. Raises ConfigError for another value.
    """
    choice = os.environ.get("LIGHTKV_OPS", "auto")
    if choice not in CHOICES:
        raise ConfigError(f"LIGHTKV_OPS must be one of {CHOICES}, got {choice!r}")
    if tensor.dtype == torch.float64:
        return False
    return choice == "triton" or (choice == "auto" and tensor.is_cuda and _has_triton())


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
