"""Which form of an operation runs: the Triton kernel on CUDA devices that have Triton, the torch twin elsewhere.

Of attention there is a third, torch's own, for CPUs.
"""

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
    choice = _choice()
    if tensor.dtype == torch.float64:
        return False
    return choice == "triton" or (choice == "auto" and tensor.is_cuda and _has_triton())


def use_fused(tensor: Tensor) -> bool:
    """True where torch's own attention should do it: in fp32 on CPUs, unless LIGHTKV_OPS says otherwise."""
    return _choice() == "auto" and tensor.device.type == "cpu" and tensor.dtype == torch.float32


def _choice() -> str:
    choice = os.environ.get("LIGHTKV_OPS", "auto")
    if choice not in CHOICES:
        raise ConfigError(f"LIGHTKV_OPS must be one of {CHOICES}, got {choice!r}")
    return choice


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
