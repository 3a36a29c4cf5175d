"""Memory: the limits of the engine's memory, and what its caches are made of."""

from dataclasses import dataclass, field

from lightkv.engine.layerkv import Bits
from lightkv.errors import ConfigError


@dataclass(frozen=True)
class Memory:
    """What bounds the engine's memory, and what its caches are made of.

    bits         of the cache of what comes before the questions
    fold         early layers end at the size of the last stage (fold.py)
    silent       layers that keep no vision after its piece
    budget       vision tokens that a prompt's cache may hold per layer; what is more merges (budget.py); needs fold
    chunk_tokens vision and text tokens that are prefilled together, but at least one image or step of a video
    answers      prompts in the engine at most, in prefill and in decoding
    cache_bytes  of all caches together: while they are full no request is taken, and of those in prefill only the one
                 that was taken first goes on. None: unbounded
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
                "a budget is of at least one token and needs fold=True, since layers that merge together must hold the "
                f"same tokens; got budget={self.budget}, fold={self.fold}"
            )
