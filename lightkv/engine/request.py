"""What the engine is asked, and what comes of it."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lightkv.engine.segments import Segment
from lightkv.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt and the questions after it.

    key        whatever tells the caller which it is
    segments   the prompt but its questions, in order; None where the next part is not there yet
    questions  token ids int64 [T], T ≥ 1, of the text after everything else, one per answer
    max_new_tokens, temperature (0: greedy), seeds (one per question; None: 0 for all)
    traced     return where every vision token went
    alone      with no other request beside it
    """

    key: Hashable
    segments: Iterable[Segment | None]
    questions: Sequence[Tensor]
    max_new_tokens: int = 128
    temperature: float = 0.0
    seeds: Sequence[int] | None = None
    traced: bool = False
    alone: bool = False

    def __post_init__(self) -> None:
        if not self.questions or any(question.ndim != 1 or len(question) < 1 for question in self.questions):
            raise ConfigError("a request needs at least one question, and every question at least one token: int64 [T]")
        if self.max_new_tokens < 1 or not 0 <= self.temperature < float("inf"):
            raise ConfigError(
                "max_new_tokens must be at least 1 and temperature a number of at least 0, "
                f"got {self.max_new_tokens} and {self.temperature}"
            )
        if self.seeds is not None and len(self.seeds) != len(self.questions):
            raise ConfigError(f"expected a seed per question, {len(self.questions)}, got {len(self.seeds)}")


@dataclass(frozen=True, eq=False)
class Generated:
    """One answer: token ids with the stop token if there was one; what its cache held when it began.

    retention  layer-averaged share of vision KV entries kept
    kv_bytes   of its cache at the end of prefill, shared parts counted in full; kv_bytes_uncompressed without
               compression, in the model's own type
    kv_bits    of the same cache in a model of 16 bits per number, whatever this one computes in; kv_bits_uncompressed
    merges     per stage int64 [V]: the vision token that each is part of, -1 for dropped; empty unless traced
    """

    tokens: list[int]
    stopped: bool
    prompt_tokens: int
    kept_tokens: int
    retention: float
    kv_bytes: int
    kv_bytes_uncompressed: int
    kv_bits: float
    kv_bits_uncompressed: float
    merges: tuple[Tensor, ...] = field(default=(), repr=False)


@dataclass(frozen=True, eq=False)
class Result:
    """What came of a request: an answer per question, or the exception that ended it.

    prefill_s, generate_s  its share of the engine's time
    waited_s               for its segments, with nothing else to do
    """

    key: Hashable
    answers: list[Generated]
    error: Exception | None
    vision_tokens: int
    prefill_s: float
    generate_s: float
    waited_s: float


@dataclass(eq=False)
class Job:
    """A request in the engine."""

    request: Request
    vision_tokens: int = 0
    text_tokens: int = 0  # but the questions
    heard: set[int] = field(default_factory=set)  # tokens of its text but the questions
    answers: dict[int, Generated] = field(default_factory=dict)
    error: Exception | None = None
    prefill_s: float = 0.0
    generate_s: float = 0.0
    waited_s: float = 0.0

    def result(self) -> Result:
        """When all is answered, or it has failed."""
        count = len(self.request.questions)
        answers = [] if self.error is not None else [self.answers[number] for number in range(count)]
        times = self.prefill_s, self.generate_s, self.waited_s
        return Result(self.request.key, answers, self.error, self.vision_tokens, *times)
