"""The exceptions of lightkv. `except LightKVError` catches all of them.

LightKVError(ValueError)
├── ConfigError            an impossible LightKVConfig, Stage or layout
├── UnsupportedModelError  a family that is not in the table, or a decoder that the hooks do not support
└── UnsupportedCallError   a call of the model that compression does not support
"""

import torch


class LightKVError(ValueError):
    """Base of all errors of this package."""


class ConfigError(LightKVError):
    """A configuration or layout is out of range or contradicts itself."""


class UnsupportedModelError(LightKVError):
    """Compression does not support the model's architecture."""


class UnsupportedCallError(LightKVError):
    """Compression does not support this call of the model (static cache, labels, …)."""


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a device or on the CPU, where torch raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
