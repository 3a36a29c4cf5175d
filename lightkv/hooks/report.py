"""Defines Report: the tokens, retention and bytes that a compressed prefill reached."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache

RETENTION_SLACK = 0.02  # a larger excess over the configured retention is more than rounding in windows


@dataclass(frozen=True)
class StageReport:
    """Vision tokens of all rows before and after the stage that follows `layer` (-1: the embeddings)."""

    layer: int
    tokens_before: int
    tokens_after: int


@dataclass(frozen=True)
class Survivors:
    """The tokens of a prompt of S tokens that are left after one stage, as positions in the prompt without padding.

    kept   int64 [S']  positions of the survivors, ascending, text included
    target int64 [S]   the survivor that each prompt token has merged into so far; -1 if it was dropped
    """

    kept: "Tensor"
    target: "Tensor"


@dataclass
class Report:
    """Figures of the latest prefill under `compress`, summed over its batch rows; zero before the first.

    retention              share of vision KV entries that were kept, averaged over layers
    kv_bytes               size of the cache after prefill, text and padding included
    kv_bytes_uncompressed  its size without compression
    vision_tokens          vision tokens in the prompts
    kept_tokens            vision tokens left in the last layers
    stages                 one StageReport per stage
    notes                  deviations from the configuration, such as fewer windows on small grids
    survivors              one Survivors per stage for each batch row, on the model's device
    prefills               number of prefills since the scope was entered
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
        """Records a prefill without vision tokens, which was not compressed."""
        size = cache_bytes(cache) if cache is not None else 0
        prefills = self.prefills + 1
        self.__init__(kv_bytes=size, kv_bytes_uncompressed=size, prefills=prefills)  # type: ignore[misc]


def cache_bytes(cache: "Cache", length: int | None = None) -> int:
    """Bytes of all keys and values; with `length`, their bytes if every layer had that many positions."""
    total = 0
    for layer in cache.layers:
        for states in (layer.keys, layer.values):
            size = states.numel() * states.element_size()
            total += size if length is None else size // states.shape[-2] * length
    return total
