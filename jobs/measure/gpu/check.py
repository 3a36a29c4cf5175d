"""Compares the kernels with their torch twins on a GPU, at real sizes and through the engine.

    python -m jobs.measure.gpu.check
    TRITON_INTERPRET=1 python -m jobs.measure.gpu.check --device cpu --parts operations quantised     # in small

Prints one line per comparison: `ok` or `BAD`, its name, and how far the two are apart. Exit code 1: something is BAD.

operations  every operation of the benchmark, at the shape of Qwen2.5-VL-7B
quantised   attention to caches of 8 and 4 bits, sequences of different lengths
far         merging in a tensor of more than 2^31 elements, on a GPU only
engine      the embedded model's answers with kernels and without, for each method and memory setting
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from jobs.measure.benchmark.__main__ import scale_of
from jobs.measure.benchmark.ops.op import Form
from jobs.measure.benchmark.ops.suite import operations
from jobs.measure.evaluate.asking import Asker
from lightkv import Bits, Engine, LightKVConfig, Memory, Request, Segment, Text
from lightkv.ops.codes import quantise
from lightkv.ops.merge import merge
from lightkv.ops.quantised import attend_quantised, attend_quantised_torch
from lightkv.ops.ragged import Keys, Sequences
from pipeline.config import Model
from pipeline.mini.render import render
from pipeline.mini.world import DemoStyle, demo_scene, questions_of

INDICES_EQUAL = 0.995  # least share; ties may break either way
MOST_RELATIVE = 1e-2  # norm of the difference / norm of the twin's result
HALF_EQUAL = 0.6  # least share of equal answers in 16 bits, where one rounding may change a word
NEW_TOKENS, FPS = 24, 2
ABSENT = -1e30  # bias of a key that attention skips


@dataclass
class Checks:
    """Prints comparisons as they are made and counts the bad ones."""

    device: torch.device
    bad: int = 0

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def note(self, name: str, good: bool, text: str) -> None:
        self.bad += not good
        print(f"{'ok ' if good else 'BAD'} {name}: {text}", flush=True)

    @contextmanager
    def named(self, name: str) -> Iterator[None]:
        """An exception inside becomes a bad comparison of this name; the GPU's cached memory is freed afterwards."""
        try:
            yield
        except Exception as error:
            self.note(name, False, f"{type(error).__name__}: {str(error)[:600]}")
            traceback.print_exc(limit=-4)
        if self.on_gpu:
            torch.cuda.empty_cache()


def check_operations(checks: Checks) -> None:
    """Every operation that has a kernel."""
    scale = scale_of(checks.device)
    for operation in operations(scale):
        for tokens in (1024, 8192) if checks.on_gpu else (256,):
            name = f"{operation.name} {tokens}"
            with checks.named(name):
                torch.manual_seed(1)
                work = operation.prepare(scale, tokens)
                if work.operation is not None:
                    _compare(checks, name, work.operation, work.twin)


def _compare(checks: Checks, name: str, operation: Form, twin: Form) -> None:
    ours, theirs = _own_tensors(operation), _own_tensors(twin)
    began = time.perf_counter()
    got = ours()
    if checks.on_gpu:
        torch.cuda.synchronize()
    spent_s = time.perf_counter() - began
    want = theirs()
    if got is None:  # merge changes hidden and weight in place
        got, want = ours.args[:2], theirs.args[:2]
    good, found = True, []
    for one, other in zip(_tensors(got), _tensors(want), strict=True):
        alike, text = _indices(one, other) if one.dtype == torch.int64 else _numbers(one, other)
        good &= alike
        found.append(text)
    checks.note(name, good, f"{' · '.join(found)} ({spent_s * 1e3:.0f} ms, first call)")


def _own_tensors(form: Form) -> "partial[object]":
    """The call on copies of its tensors if it merges, because merging works in place."""
    assert isinstance(form, partial)
    copied = "merge" in form.func.__name__
    arguments = (x.clone() if copied and isinstance(x, Tensor) else x for x in form.args)
    return partial(form.func, *arguments, **form.keywords)


def _tensors(result: object) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    assert isinstance(result, (list, tuple))
    return [tensor for part in result for tensor in _tensors(part)]


def _indices(got: Tensor, want: Tensor) -> tuple[bool, str]:
    share = (got == want).double().mean().item()
    return share > INDICES_EQUAL, f"equal {share:.5f}"


def _numbers(got: Tensor, want: Tensor) -> tuple[bool, str]:
    got, want = got.double(), want.double()
    finite = got.isfinite() & want.isfinite()
    same_finite = bool((got.isfinite() == want.isfinite()).all())
    apart = got[finite] - want[finite]
    relative = (apart.norm() / want[finite].norm().clamp(min=1e-30)).item()
    most = apart.abs().max().item() if len(apart) else 0.0
    good = relative < MOST_RELATIVE and same_finite and not bool(got.isnan().any())
    return good, f"relative {relative:.1e} most {most:.1e} finite alike {same_finite}"


def check_quantised(checks: Checks) -> None:
    """Sequences of different lengths, one of them empty; the last keys of the tail are absent."""
    dims, heads, kv_heads = (128, 28, 4) if checks.on_gpu else (16, 4, 2)
    lengths = [4096, 32, 0, 1056] if checks.on_gpu else [64, 32, 0]
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if checks.on_gpu else (torch.float32,)
    tokens, batch, tail_tokens = sum(lengths), len(lengths), 70
    sequences = Sequences.of(lengths, checks.device)
    for bits, dtype in ((bits, dtype) for bits in (8, 4) for dtype in dtypes):
        name = f"quantised, {bits} bits, {dtype}"
        with checks.named(name):
            draw = partial(torch.randn, device=checks.device, dtype=dtype)
            packed = quantise(draw(kv_heads, tokens, dims), draw(kv_heads, tokens, dims), bits, 32)
            bias = torch.rand(tokens, device=checks.device) * 4
            tail_bias = torch.zeros(batch, tail_tokens, device=checks.device)
            tail_bias[:, 60:] = ABSENT
            shape = batch, kv_heads, tail_tokens, dims
            tail = Keys(draw(*shape), draw(*shape), tail_bias)
            arguments = (draw(batch, heads, dims), packed, sequences, bias, tail, dims**-0.5)
            checks.note(name, *_numbers(attend_quantised(*arguments), attend_quantised_torch(*arguments)))


def check_far(checks: Checks) -> None:
    """Rows beyond 2^31 elements, which need 64-bit addresses."""
    if not checks.on_gpu:
        return
    name = "merge beyond 2^31 elements"
    with checks.named(name):
        hidden = torch.randn(650_000, 3584, device=checks.device, dtype=torch.bfloat16)
        source = torch.tensor([649_999, 5, 649_000], device=checks.device)
        target = torch.tensor([649_998, 649_998, 1], device=checks.device)
        three = hidden[[649_998, 649_999, 5]].float().mean(0)
        two = hidden[[1, 649_000]].float().mean(0)
        merge(hidden, torch.ones(len(hidden), device=checks.device), source, target)
        apart = max((hidden[649_998] - three).abs().max().item(), (hidden[1] - two).abs().max().item())
        checks.note(name, apart < 2e-2, f"most {apart:.1e}")


Dtype = Literal["float32", "bfloat16"]


class Embedded:
    """The embedded model on a device, and rendered videos with questions for it."""

    def __init__(self, device: torch.device, dtype: Dtype) -> None:
        settings = Model(name="mini", device=device.type, dtype=dtype, max_new_tokens=NEW_TOKENS)
        self.asker = Asker(settings)
        self.model = self.asker.model

    def request(self, number: int) -> Request:
        """Up to three questions on one video of 32 frames."""
        scene, draw = demo_scene(number, 0, DemoStyle(duration_s=16.0))
        frames = render(scene, np.arange(16 * FPS) / FPS)
        resident = self.asker.resident
        parts = resident.encoder.parts(self.model, "video", [(0, frames)])
        asked = [resident.prompts.frame(qa.question, "video") for qa in questions_of(scene, draw)[:3]]
        segments: list[Segment] = [Text(asked[0].before), *(part for part in parts if part is not None)]
        return Request(number, segments, [frame.after for frame in asked], max_new_tokens=NEW_TOKENS)

    def answers(self, config: LightKVConfig | None, memory: Memory, videos: int) -> dict[tuple[int, int], str]:
        """(video, question) → text."""
        found = {}
        for result in Engine(self.model, config, memory).run([self.request(number) for number in range(videos)]):
            if result.error is not None:
                raise result.error
            for number, answer in enumerate(result.answers):
                found[int(str(result.key)), number] = self.asker.resident.text(answer.tokens)
        return found


def engine_settings(model: torch.nn.Module) -> dict[str, tuple[LightKVConfig | None, Memory]]:
    """Methods and memory settings by name."""
    ours = partial(LightKVConfig.for_model, model.config)
    return {
        "plain": (None, Memory()),
        "lightkv 25%": (ours(0.25), Memory()),
        "pieces": (ours(0.25), Memory(chunk_tokens=100)),
        "spacetime, folded, 4 bits": (ours(0.25, method="spacetime"), Memory(Bits(4), fold=True)),
        "8 bits": (ours(0.4), Memory(Bits(8), answers=4)),
        "budget": (ours(0.4), Memory(fold=True, budget=120, chunk_tokens=150)),
        "published": (ours(0.55, method="published"), Memory()),
        "tome": (ours(0.4, method="tome"), Memory()),
    }


def check_engine(checks: Checks) -> None:
    """In float32 all answers must be equal; in bfloat16 most."""
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    for dtype in dtypes:
        embedded = Embedded(checks.device, dtype)
        for setting, (config, memory) in engine_settings(embedded.model).items():
            name = f"engine {dtype} {setting}"
            with checks.named(name):
                videos = 6 if checks.on_gpu else 1
                with _ops("auto" if checks.on_gpu else "triton"):
                    got = embedded.answers(config, memory, videos)
                with _ops("torch"):
                    want = embedded.answers(config, memory, videos)
                equal = sum(got[key] == want[key] for key in want)
                least = len(want) * (1.0 if dtype == "float32" else HALF_EQUAL)
                checks.note(name, equal >= least, f"{equal} of {len(want)} answers equal, {got[0, 0][:70]!r}")


@contextmanager
def _ops(choice: str) -> Iterator[None]:
    """LIGHTKV_OPS within the scope."""
    before = os.environ.get("LIGHTKV_OPS")
    os.environ["LIGHTKV_OPS"] = choice
    try:
        yield
    finally:
        if before is None:
            del os.environ["LIGHTKV_OPS"]
        else:
            os.environ["LIGHTKV_OPS"] = before


PARTS: dict[str, Callable[[Checks], None]] = {
    "operations": check_operations,
    "quantised": check_quantised,
    "far": check_far,
    "engine": check_engine,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts in order; 1 if a comparison is bad."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS), help="default: all")
    args = parser.parse_args(arguments)
    checks = Checks(torch.device(args.device))
    with torch.inference_mode(), _ops("auto" if checks.on_gpu else "triton"):
        for part in args.parts:
            PARTS[part](checks)
    print("bad:", checks.bad)
    return int(checks.bad > 0)


if __name__ == "__main__":
    sys.exit(main())
