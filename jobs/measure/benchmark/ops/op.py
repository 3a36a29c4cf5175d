"""One operation at one size: the forms to time, and its minimal bytes and FLOPs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

from jobs.measure.benchmark.cell import Values, attempt, not_measured
from jobs.measure.benchmark.run import timing
from jobs.measure.benchmark.scale import Scale
from jobs.measure.benchmark.timer import Timer
from lightkv.ops.dispatch import use_triton

CACHE_BYTES = 1 << 28  # more than a GPU's last-level cache; written before each repeat, which then reads from memory
KERNEL, TWIN = "kernel", "twin"

Form = Callable[[], object]


@dataclass(frozen=True)
class OpWork:
    """An operation that is ready to be timed.

    operation    the public function, which runs the kernel if there is one; None: torch only
    twin         its torch twin
    moved_bytes  minimal memory traffic (bytes.py)
    flops        minimal FLOPs; 0 if the operation is not limited by them
    beside       alternatives with the same result, by name
    missing      alternatives that are not measured here, and why
    """

    operation: Form | None
    twin: Form
    moved_bytes: int
    flops: int = 0
    beside: Mapping[str, Form] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)

    @property
    def forms(self) -> dict[str, Form]:
        """All forms that can be timed, by name."""
        ours = {} if self.operation is None else {KERNEL: self.operation}
        return {**ours, TWIN: self.twin, **self.beside}


@dataclass(frozen=True)
class Op:
    """An operation of the suite: `prepare` sets it up; its twin is not timed above `twin_most` tokens."""

    name: str
    prepare: Callable[[Scale, int], OpWork]
    twin_most: int

    def measure(self, scale: Scale, tokens: int, timer: Timer) -> Values:
        """Bytes, FLOPs, and each form's time or why it has none. A form that fails does not stop the others."""
        work = self.prepare(scale, tokens)
        spoil = _cache_spoiler(scale.device)
        forms = {name: not_measured(why) for name, why in work.missing.items()}
        for name, form in work.forms.items():
            why = self._why_not(name, scale, tokens)
            forms[name] = not_measured(why) if why else attempt(partial(timing, timer, form, spoil))
        return {"bytes": work.moved_bytes, "flops": work.flops, "forms": forms}

    def _why_not(self, form: str, scale: Scale, tokens: int) -> str:
        if form == KERNEL and not use_triton(torch.empty(0, device=scale.device)):
            return f"no kernel on {scale.device.type}"
        if form == TWIN and tokens > self.twin_most:
            return f"the twin takes too long above {self.twin_most:,} tokens"
        return ""


def _cache_spoiler(device: torch.device) -> Form | None:
    """A function that overwrites the GPU's cache; None on a CPU, whose times say nothing about speed."""
    return torch.empty(CACHE_BYTES, dtype=torch.int8, device=device).zero_ if device.type == "cuda" else None
