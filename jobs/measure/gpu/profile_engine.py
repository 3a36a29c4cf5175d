"""Profiles prefill and decode steps of the engine on a GPU, at Qwen2.5-VL-7B's shape with random weights.

    python -m jobs.measure.gpu.profile_engine [--long]
    python -m jobs.measure.gpu.profile_engine --device cpu     # a small shape, to try the script

prefill …  milliseconds of a prompt: plain, by compress(), by the engine
decode …   milliseconds of a decode step
== …       wall time against the sum of kernel times, number of launches; then the longest kernels and host calls
-- …       waits of the host for the GPU, by the line of the library that causes them
"""

import argparse
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from jobs.measure.benchmark.decoder import QWEN2_5_VL, Decoder
from jobs.measure.benchmark.model import prefill
from jobs.measure.benchmark.prompt import TEXT_AFTER, TEXT_BEFORE, Prompt, grid_of
from lightkv import Bits, Engine, LightKVConfig, Memory, Request, Segment, Text, Vision, compress
from lightkv.cost import Shape
from lightkv.paper import QWEN2_5_7B

RETENTIONS = (0.55, 0.25)
NEW_TOKENS = 33  # the first comes from the prefill
PROFILED_TOKENS = 8192
HOST_CALLS = (
    "cudaStreamSynchronize cudaDeviceSynchronize cudaMemcpyAsync aten::item aten::nonzero "
    "cudaLaunchKernel cuLaunchKernelEx cudaLaunchKernelExC"
).split()
LIBRARY = str(Path(sys.modules[Engine.__module__.partition(".")[0]].__file__ or "").parent)

Work = Callable[[], object]


@dataclass(frozen=True)
class Profiler:
    """Times, profiles and counts waits on one device."""

    device: torch.device

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Work, repeats: int = 3) -> float:
        """The shortest of `repeats`, after one run to warm up."""
        work()
        return min(self._once(work) for _ in range(repeats))

    def _once(self, work: Work) -> float:
        self.wait()
        began = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - began

    def kernels(self, name: str, work: Work, top: int = 16) -> None:
        """Print wall time, the sum of kernel times, and the longest kernels and host calls."""
        wall_s = self.seconds(work, repeats=1)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])]
        with profile(activities=activities) as found:
            self._once(work)
        kernels: dict[str, tuple[int, float]] = {}
        calls: Counter[str] = Counter()
        for event in found.events() or ():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                count, spent_us = kernels.get(event.name[:84], (0, 0.0))
                kernels[event.name[:84]] = count + 1, spent_us + event.time_range.elapsed_us()
            if event.name in HOST_CALLS:
                calls[event.name] += 1
        sum_s = sum(spent_us for _, spent_us in kernels.values()) / 1e6
        launches = sum(count for count, _ in kernels.values())
        print(
            f"== {name}: wall {wall_s * 1e3:.1f} ms, kernels {sum_s * 1e3:.1f} ms ({sum_s / wall_s:.0%}) "
            f"in {launches} launches and copies, {dict(calls)}"
        )
        for kernel, (count, spent_us) in sorted(kernels.items(), key=lambda item: -item[1][1])[:top]:
            print(f"   {spent_us / 1e3:9.2f} ms {count:6d}x {kernel}")
        on_host = [row for row in found.key_averages() if row.device_type == torch.autograd.DeviceType.CPU]
        longest = sorted(on_host, key=lambda row: -row.self_cpu_time_total)[:10]
        print(
            "   host: " + ", ".join(f"{row.key} {row.self_cpu_time_total / 1e3:.1f} ms {row.count}x" for row in longest)
        )
        sys.stdout.flush()

    def waits(self, name: str, work: Work) -> None:
        """Print how often the host waits for the GPU, by the innermost line of the library. Nothing on a CPU."""
        if self.device.type != "cuda":
            work()
            return
        found: Counter[str] = Counter()

        def count(*_: Any, **__: Any) -> None:
            stack = traceback.extract_stack()
            own = [frame for frame in stack if frame.filename.startswith(LIBRARY)] or stack[-3:-2]
            found[f"{Path(own[-1].filename).name}:{own[-1].lineno} {(own[-1].line or '')[:90]}"] += 1

        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = count
            torch.cuda.set_sync_debug_mode("warn")
            try:
                work()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        print(f"-- waits of {name}: {sum(found.values())}")
        for line, times in found.most_common(30):
            print(f"   {times:5d}x {line}")
        sys.stdout.flush()


@dataclass(frozen=True)
class Subject:
    """A decoder with random weights, and prompts of one video for it."""

    model: PreTrainedModel
    shape: Shape
    device: torch.device
    dtype: torch.dtype

    def ours(self, retention: float, method: str = "lightkv") -> LightKVConfig:
        return LightKVConfig.for_model(self.model.config, retention, method=method)

    def prompt(self, vision: int) -> Prompt:
        return Prompt.of(vision, 1, self.shape.hidden, QWEN2_5_VL.axes, self.device, self.dtype)

    def engine(
        self, features: Tensor, config: LightKVConfig | None, memory: Memory, new_tokens: int = 1, prompts: int = 1
    ) -> Work:
        """Answers of `new_tokens` tokens each to `prompts` equal prompts with vision tokens `features` [n, D]."""
        engine, grid = Engine(self.model, config, memory), grid_of(len(features))

        def request(key: int) -> Request:
            segments: list[Segment] = [Text(torch.arange(TEXT_BEFORE)), Vision(features, grid)]
            return Request(key, segments, [torch.arange(TEXT_AFTER)], max_new_tokens=new_tokens)

        def work() -> None:
            for result in engine.run([request(key) for key in range(prompts)]):
                if result.error is not None:
                    raise result.error

        return work


def profile_prefill(profiler: Profiler, subject: Subject, vision: int, closely: bool) -> None:
    """Print milliseconds of one prefill by each way; `closely` profiles three of them, too."""
    prompt = subject.prompt(vision)
    features = _features(prompt, vision)
    plain = partial(prefill, subject.model, prompt)
    found = {"plain": profiler.seconds(plain)}
    for retention in RETENTIONS:
        with compress(subject.model, subject.ours(retention), prompt.layouts):
            found[f"compress {retention:.0%}"] = profiler.seconds(plain)
    least = RETENTIONS[-1]
    runs: dict[str, tuple[LightKVConfig | None, Memory]] = {
        "engine plain": (None, Memory()),
        **{f"engine {retention:.0%}": (subject.ours(retention), Memory()) for retention in RETENTIONS},
        f"engine {least:.0%} spacetime": (subject.ours(least, "spacetime"), Memory()),
        f"engine {least:.0%} folded, 4 bits": (subject.ours(least), Memory(Bits(4), fold=True)),
    }
    for name, (config, memory) in runs.items():
        found[name] = profiler.seconds(subject.engine(features, config, memory))
    print(f"prefill {vision}, ms: " + " | ".join(f"{name} {1e3 * s:.1f}" for name, s in found.items()), flush=True)
    if closely:
        with compress(subject.model, subject.ours(least), prompt.layouts):
            profiler.kernels(f"compress {least:.0%} {vision}", plain)
        work = subject.engine(features, subject.ours(least), Memory())
        profiler.kernels(f"engine {least:.0%} {vision}", work)
        profiler.waits(f"engine {least:.0%} {vision}", work)
        profiler.kernels(f"plain {vision}", plain, 6)


def profile_decode(profiler: Profiler, subject: Subject, vision: int, answers: int, memory: Memory) -> None:
    """Print milliseconds of a decode step of so many answers; profile steps of up to 16."""
    features, config = _features(subject.prompt(vision), vision), subject.ours(RETENTIONS[-1])
    work = partial(subject.engine, features, config, memory, prompts=answers)
    first_s, all_s = (profiler.seconds(work(new_tokens=count), repeats=1) for count in (1, NEW_TOKENS))
    name = f"{answers} answers, cache of {memory.bits.bits} bits, fold {memory.fold}"
    step_ms = (all_s - first_s) / (NEW_TOKENS - 1) * 1e3
    print(f"decode {name}: {step_ms:.2f} ms a step; prefill of all {first_s * 1e3:.0f} ms", flush=True)
    if answers <= 16:
        profiler.kernels(f"{name}, 2 tokens", work(new_tokens=2), 3)
        profiler.kernels(f"{name}, 10 tokens", work(new_tokens=10), 18)
        profiler.waits(f"{name}, 10 tokens", work(new_tokens=10))


def _features(prompt: Prompt, vision: int) -> Tensor:
    return prompt.embeds[0, TEXT_BEFORE : TEXT_BEFORE + vision].clone()


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the model and profile prefill, then decode steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--long", action="store_true", help="a prompt of 32,768 vision tokens, too")
    args = parser.parse_args(arguments)
    device, on_gpu = torch.device(args.device), args.device == "cuda"
    tiny = Shape(layers=6, hidden=64, intermediate=128, heads=4, kv_heads=2, head_dim=16, vocabulary=128)
    shape, dtype = (QWEN2_5_7B, torch.bfloat16) if on_gpu else (tiny, torch.float32)
    profiler = Profiler(device)
    decoder = Decoder("profiled", shape, QWEN2_5_VL, LightKVConfig.published("qwen2.5-vl-7b"))
    torch.manual_seed(0)
    began = time.perf_counter()
    subject = Subject(decoder.build(device, dtype), shape, device, dtype)
    profiler.wait()
    print(f"model built in {time.perf_counter() - began:.1f} s", flush=True)
    sizes = (2048, 8192, *([32768] if args.long else [])) if on_gpu else (512,)
    with torch.inference_mode():
        for vision in sizes:
            profile_prefill(profiler, subject, vision, closely=vision in (sizes[-1], PROFILED_TOKENS))
        for answers in (16, 64) if on_gpu else (3,):
            profile_decode(profiler, subject, sizes[0], answers, Memory(answers=answers))
        answers = 16 if on_gpu else 3
        profile_decode(profiler, subject, sizes[0], answers, Memory(Bits(4), fold=True, answers=answers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
