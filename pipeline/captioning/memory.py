"""Sizes the engine's caches, pieces and batches from the job's settings and the device's memory."""

from dataclasses import dataclass
from typing import Any

import torch

from lightkv import Bits, ConfigError, Memory
from lightkv.cost import Shape
from pipeline.config import JobConfig, Limits
from pipeline.errors import ConfigError as JobError

CACHES, PIECE = 0.6, 0.25  # shares of the memory beside the weights; the rest is for the vision tower and the allocator
LEAST_PIECE = 256  # tokens


@dataclass(frozen=True)
class Room:
    """Bytes on the device: how many this process may use, and how many the weights take."""

    total: int
    weights: int

    @property
    def left(self) -> int:
        return self.total - self.weights


def bound_device(limits: Limits, device: torch.device) -> Room | None:
    """Limit the device's memory to `limits.gpu_memory_bytes` and return what there is. None on a CPU.

    Call it after the weights are loaded.
    """
    if device.type != "cuda":
        return None
    whole = torch.cuda.get_device_properties(device).total_memory
    total = min(limits.gpu_memory_bytes or whole, whole)
    torch.cuda.set_per_process_memory_fraction(total / whole, device)
    return Room(total, torch.cuda.memory_allocated(device))


def memory_of(job: JobConfig, model_config: Any, dtype: torch.dtype, room: Room | None) -> Memory:
    """The engine's `Memory` for this job, model and room (None: the job's settings, unbounded).

    Raises `ConfigError` if the room is too small for a piece of LEAST_PIECE tokens, or the budget for one token.
    """
    engine, shape = job.engine, Shape.of(model_config)
    try:
        bits = Bits(engine.kv_bits, engine.kv_group)
    except ConfigError as error:
        raise JobError(f"engine: {error}") from None
    chunk_tokens, cache_bytes = engine.chunk_tokens, engine.cache_bytes
    if room is not None:
        fits = int(max(room.left, 0) * PIECE) // piece_bytes_per_token(shape, dtype)
        if fits < LEAST_PIECE:
            raise JobError(
                f"limits.gpu_memory_bytes: the weights take {room.weights:,} of {room.total:,} bytes, which leaves too "
                f"little for a piece of {LEAST_PIECE} tokens; raise the limit, or use a smaller model or dtype"
            )
        chunk_tokens = min(chunk_tokens, fits)
        cache_bytes = cache_bytes or int(room.left * CACHES)
    budget = None
    if job.budget.kv_bytes is not None:
        held = shape.layers - len(engine.silent_layers)
        per_token = held * 2 * shape.kv_heads * shape.head_dim * bits.per_number(shape.head_dim) / 8
        budget = int(job.budget.kv_bytes / per_token)
        if budget < 1:
            raise JobError(f"budget.kv_bytes: {job.budget.kv_bytes} is less than a token's {per_token:,.0f} bytes")
    return Memory(
        bits=bits,
        fold=engine.fold or budget is not None,
        silent=frozenset(engine.silent_layers),
        budget=budget,
        chunk_tokens=chunk_tokens,
        answers=engine.answers,
        cache_bytes=cache_bytes,
    )


def piece_bytes_per_token(shape: Shape, dtype: torch.dtype) -> int:
    """Most bytes a token takes while it runs through a layer: states, projections, MLP, and fp32 states in a stage."""
    states = 6 * shape.hidden + 3 * shape.intermediate + 2 * (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    return states * dtype.itemsize + 4 * 3 * shape.hidden
