"""Chooses the form of an operation: the Triton kernel on CUDA devices if Triton is installed, else the torch twin.

Attention has a third form, torch's own attention, for CPUs.
"""

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from lightkv.errors import ConfigError

CHOICES = ("auto", "torch", "triton")


def use_triton(tensor: Tensor) -> bool:
    """Whether the Triton kernels should run on this tensor; never for float64.

    LIGHTKV_OPS=torch disables the kernels. LIGHTKV_OPS=triton enables them on every device; on CPUs this needs
    TRITON_INTERPRET=1. Raises ConfigError for other values.
    """
    choice = _choice()
    if tensor.dtype == torch.float64:
        return False
    return choice == "triton" or (choice == "auto" and tensor.is_cuda and _has_triton())


def use_fused(tensor: Tensor) -> bool:
    """Whether torch's own attention should run: fp32 on CPUs, unless LIGHTKV_OPS overrides the choice."""
    return _choice() == "auto" and tensor.device.type == "cpu" and tensor.dtype == torch.float32


def _choice() -> str:
    choice = os.environ.get("LIGHTKV_OPS", "auto")
    if choice not in CHOICES:
        raise ConfigError(f"LIGHTKV_OPS must be one of {CHOICES}, got {choice!r}")
    return choice


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
