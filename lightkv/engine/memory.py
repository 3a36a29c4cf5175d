"""The engine's memory settings: size and precision of its caches, and limits on what it holds at once."""

from dataclasses import dataclass, field

from lightkv.engine.layerkv import Bits
from lightkv.errors import ConfigError


@dataclass(frozen=True)
class Memory:
    """Size and precision of the engine's caches, and limits on what it holds at once.

    bits         precision of the prompt's cache; questions and answers keep the model's own type
    fold         early layers keep as many tokens as the last stage leaves (fold.py)
    silent       numbers of layers that drop their vision entries after each piece
    budget       most vision tokens per layer of a prompt's cache; more are merged (budget.py); needs fold
    chunk_tokens vision and text tokens per piece; a piece has at least one image or one step of a video
    answers      most prompts in the engine, in prefill and in decoding
    cache_bytes  limit on all caches together, None: none. While it is reached, no request enters and only the oldest
                 request in prefill continues
    """

    bits: Bits = field(default_factory=Bits)
    fold: bool = False
    silent: frozenset[int] = frozenset()
    budget: int | None = None
    chunk_tokens: int = 4096
    answers: int = 16
    cache_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1 or self.answers < 1:
            raise ConfigError(
                f"chunk_tokens and answers must be at least 1, got {self.chunk_tokens} and {self.answers}"
            )
        if self.budget is not None and not (self.fold and self.budget >= 1):
            raise ConfigError(
                "a budget must be at least 1 token and needs fold=True, because layers that are merged together must "
                f"hold the same tokens; got budget={self.budget}, fold={self.fold}"
            )
