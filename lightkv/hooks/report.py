"""What a compressed prefill really reached: tokens, retention, bytes."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache

RETENTION_SLACK = 0.02  # above this, what was reached is no longer a matter of rounding in windows


@dataclass(frozen=True)
class StageReport:
    """Vision tokens of the whole batch before and after the stage that follows `layer` (-1: the embeddings)."""

    layer: int
    tokens_before: int
    tokens_after: int


@dataclass(frozen=True)
class Survivors:
    """What one stage has left of a prompt of S tokens, in positions of the prompt, its padding not counted.

    kept   int64 [S']  ascending; text included
    target int64 [S]   the survivor that each token of the prompt is part of by now; -1 if it was dropped
    """

    kept: "Tensor"
    target: "Tensor"


@dataclass
class Report:
    """Figures of the latest prefill under `compress`, summed over its batch rows; zero before the first.

    retention              layer-averaged share of vision KV entries kept, as reached
    kv_bytes               size of the cache after prefill, text and padding included
    kv_bytes_uncompressed  size it would have had without compression
    vision_tokens          vision tokens in the prompts
    kept_tokens            of these, in the last layers
    stages                 one entry per stage
    notes                  what could not be done as asked
    survivors              for each row of the batch, a Survivors per stage; on the model's device
    prefills               prefills seen since the scope was entered
    """

    retention: float = 1.0
    kv_bytes: int = 0
    kv_bytes_uncompressed: int = 0
    vision_tokens: int = 0
    kept_tokens: int = 0
    stages: tuple[StageReport, ...] = ()
    notes: tuple[str, ...] = ()
    prefills: int = 0
    survivors: tuple[tuple[Survivors, ...], ...] = field(default=(), repr=False, compare=False)

    def record_text(self, cache: "Cache | None") -> None:
        """Take over the figures of a prefill without vision, which was left alone."""
        size = cache_bytes(cache) if cache is not None else 0
        prefills = self.prefills + 1
        self.__init__(kv_bytes=size, kv_bytes_uncompressed=size, prefills=prefills)  # type: ignore[misc]


def cache_bytes(cache: "Cache", length: int | None = None) -> int:
    """Bytes of all keys and values; with `length`, what they would take at that many positions per layer."""
    total = 0
    for layer in cache.layers:
        for states in (layer.keys, layer.values):
            size = states.numel() * states.element_size()
            total += size if length is None else size // states.shape[-2] * length
    return total
