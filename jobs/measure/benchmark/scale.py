"""Sizes of the benchmark: those of real models on a GPU, small ones on a CPU, which test the benchmark itself."""

from dataclasses import dataclass

import torch

from jobs.measure.benchmark.decoder import LLAMA, QWEN2_5_VL, Decoder
from lightkv import LightKVConfig, Stage
from lightkv.cost import Shape
from lightkv.paper import INTERNLM2_7B, QWEN2_5_7B, VICUNA_7B

K = 1024


@dataclass(frozen=True)
class Scale:
    """Sizes of all suites, in tokens unless the name says otherwise.

    shape           of operations and stages; `op_schedule` is its published schedule
    attend_most     largest prefill of the attention operation
    twin_most       largest prefill that runs on the dense torch twin of attention
    memory_bytes    of the device, minus a reserve; None: no cell is skipped for its size
    flops_per_s     assumed speed for time estimates, rather too fast; None: all cells are short
    """

    device: torch.device
    dtype: torch.dtype
    shape: Shape
    op_schedule: LightKVConfig
    op_tokens: tuple[int, ...]
    attend_most: int
    twin_most: int
    stage_tokens: tuple[int, ...]
    decoders: tuple[Decoder, ...]
    prefill_vision: tuple[int, ...]
    prefill_batches: tuple[int, ...]
    decode_vision: int
    decode_batches: tuple[int, ...]
    copy_bytes: int
    matmul_side: int
    budget_s: float
    memory_bytes: int | None = None
    flops_per_s: float | None = None

    @property
    def element(self) -> int:
        """Bytes of one element of the model's dtype."""
        return self.dtype.itemsize

    def estimate_s(self, flops: float) -> float:
        return flops / self.flops_per_s if self.flops_per_s else 0.0


def on_gpu(device: torch.device, memory_bytes: int) -> Scale:
    """bf16, the paper's 7B shapes, 1k to 256k tokens; all suites take about eight minutes on an H200."""
    return Scale(
        device=device,
        dtype=torch.bfloat16,
        shape=QWEN2_5_7B,
        op_schedule=LightKVConfig.published("qwen2.5-vl-7b"),
        op_tokens=(1 * K, 4 * K, 8 * K, 32 * K, 64 * K, 256 * K),
        attend_most=64 * K,
        twin_most=8 * K,
        stage_tokens=(2 * K, 8 * K, 32 * K, 64 * K),
        decoders=(
            # LLaVA-1.5 and LLaVA-NeXT have the same shape and schedule; they differ in tokens per image.
            Decoder("llava-1.5-7b, llava-next-7b", VICUNA_7B, LLAMA, LightKVConfig.published("llava-1.5-7b")),
            Decoder("internvl2-8b", INTERNLM2_7B, LLAMA, LightKVConfig.published("internvl2-8b")),
            Decoder("qwen2.5-vl-7b", QWEN2_5_7B, QWEN2_5_VL, LightKVConfig.published("qwen2.5-vl-7b")),
        ),
        prefill_vision=(576, 2 * K, 8 * K, 32 * K, 64 * K),
        prefill_batches=(1, 8),
        decode_vision=8 * K,
        decode_batches=(1, 8, 32),
        copy_bytes=1 << 30,
        matmul_side=8 * K,
        budget_s=0.25,
        memory_bytes=int(memory_bytes * 0.94),
        flops_per_s=6e14,
    )


def on_cpu(device: torch.device) -> Scale:
    """fp32, two decoders of four layers, up to 1k tokens; takes seconds, and its times say nothing about a GPU."""
    tiny = Shape(layers=4, hidden=64, intermediate=128, heads=4, kv_heads=2, head_dim=16, vocabulary=128)
    schedule = LightKVConfig((Stage(0, 4), Stage(1, 2), Stage(2, 1)), method="published")
    return Scale(
        device=device,
        dtype=torch.float32,
        shape=tiny,
        op_schedule=schedule,
        op_tokens=(256, 1 * K),
        attend_most=1 * K,
        twin_most=1 * K,
        stage_tokens=(256,),
        decoders=(
            Decoder("tiny llama", tiny, LLAMA, schedule),
            Decoder("tiny qwen2.5-vl", tiny, QWEN2_5_VL, schedule),
        ),
        prefill_vision=(64, 256),
        prefill_batches=(1, 2),
        decode_vision=256,
        decode_batches=(1, 2),
        copy_bytes=1 << 24,
        matmul_side=256,
        budget_s=0.01,
    )
