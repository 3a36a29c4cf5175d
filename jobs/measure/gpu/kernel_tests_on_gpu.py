"""A pytest plugin that runs the kernel tests on a GPU.

    TRITON_INTERPRET=0 python -m pytest -p jobs.measure.gpu.kernel_tests_on_gpu tests/lightkv/ops \
        -k "not compile and not spill"

The tests make CPU tensors. With this plugin each `*_triton` function gets CUDA copies of them; what it changed in place
is copied back, and its results return to the CPU. Sparse files for tensors beyond 2^31 elements become CUDA memory.
Without a GPU the plugin changes nothing.
"""

import dataclasses
import functools
import gc
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KERNELS = {
    "attend_kernel": ("attend_triton", "attend_packed_triton"),
    "compact_kernel": ("compact_triton",),
    "merge_kernel": ("merge_triton",),
    "nearest_kernel": ("nearest_triton",),
    "quantised_kernel": ("attend_quantised_triton",),
    "votes_kernel": ("softmax_votes_triton",),
}
MOST_COPIED = 1 << 24  # elements of an argument that is looked at for changes in place
_same = Tensor.equal


def pytest_configure() -> None:
    """Patches modules and torch for the life of the test process, ahead of collection."""
    if not torch.cuda.is_available():
        return
    for module_name, names in KERNELS.items():
        module = importlib.import_module(f"lightkv.ops.{module_name}")
        for name in names:
            setattr(module, name, on_gpu(getattr(module, name)))
    torch.Tensor.equal = _equal  # type: ignore[assignment, method-assign]
    torch.from_file = _from_file  # type: ignore[assignment]


def pytest_runtest_teardown(item: Any) -> None:
    """Frees the memory of tests on tensors beyond 2^31 elements."""
    if "beyond" in item.name and torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def on_gpu(function: Callable[..., Any], device: str = "cuda") -> Callable[..., Any]:
    """The function on copies of its tensors on the device; results, and changes in place, come back to the CPU."""

    @functools.wraps(function)
    def moved(*arguments: Any, **keywords: Any) -> Any:
        copies: list[tuple[Tensor, Tensor]] = []
        theirs = [_to(x, device, copies) for x in arguments]
        result = function(*theirs, **{name: _to(x, device, copies) for name, x in keywords.items()})
        if copies and device == "cuda":
            torch.cuda.synchronize()
        for original, copy in copies:
            if _may_change(original) and not _same(_bits(original), _bits(copy)):
                original.copy_(copy.cpu())
        return _back(result)

    return moved


def _to(x: Any, device: str, copies: list[tuple[Tensor, Tensor]]) -> Any:
    """x with its tensors on the device, in dataclasses and sequences, too; `copies` gets (original, copy)."""
    if isinstance(x, Tensor):
        if x.device.type in (device, "meta"):
            return x
        copy = x.to(device, copy=True)
        copies.append((x, copy))
        return copy
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        fields = (field.name for field in dataclasses.fields(x) if field.init)
        return dataclasses.replace(x, **{name: _to(getattr(x, name), device, copies) for name in fields})
    if isinstance(x, (list, tuple)):
        return type(x)(_to(part, device, copies) for part in x)
    return x


def _back(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x if x.device.type == "meta" else x.cpu()
    return tuple(_back(part) for part in x) if isinstance(x, tuple) else x


def _may_change(x: Tensor) -> bool:
    return 0 < x.numel() < MOST_COPIED and x.dim() > 0 and not x.is_inference() and not x.requires_grad


def _bits(x: Tensor) -> Tensor:
    """Bytes, so that NaN equals NaN."""
    return x.detach().cpu().contiguous().view(torch.uint8)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Tensor.equal between devices."""
    return _same(one, other if one.device == other.device else other.to(one.device))


def _from_file(
    name: str, shared: bool | None = None, size: int = 0, dtype: torch.dtype = torch.float32, **_: Any
) -> Tensor:
    """Zeros on the GPU in place of a sparse file, which exists and stays empty."""
    Path(name).touch()
    return torch.zeros(size, dtype=dtype, device="cuda")
