"""What lightkv raises: one tree, so that `except LightKVError` catches everything the package refuses.

LightKVError(ValueError)
├── ConfigError            a LightKVConfig, Stage or layout that cannot be right
├── UnsupportedModelError  no row in the table of families, or a decoder the hooks cannot drive
└── UnsupportedCallError   a way of calling the model that compression cannot honour
"""

import torch


class LightKVError(ValueError):
    """Base of all errors of this package."""


class ConfigError(LightKVError):
    """A configuration or layout is out of range or contradicts itself."""


class UnsupportedModelError(LightKVError):
    """The model's architecture is not one that compression can be attached to."""


class UnsupportedCallError(LightKVError):
    """The model is called in a way that compression cannot honour (static cache, labels, …)."""


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a device or on the CPU, whose allocator raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
