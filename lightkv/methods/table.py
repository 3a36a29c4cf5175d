"""The table of methods: how each one compresses, which scores it needs, what it costs, and its usual schedule.

A method is one row of METHODS. Methods take numbers; the rows read them from the stage and the configuration. Hooks,
positions, masks, sizes and the accounting are the same for all methods.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from lightkv.methods.guidance import GUIDANCES, LastQuery, QuestionAttention, Scorer, UniformGuidance, Votes
from lightkv.methods.pruning import asked, evs, fastv, random, stride
from lightkv.methods.published import published, published_cost
from lightkv.methods.schedule import Plan, derive, derive_early, derive_single
from lightkv.methods.settings import Settings, Stage
from lightkv.methods.spacetime import spacetime, spacetime_cost
from lightkv.methods.tome import tome, tome_cost
from lightkv.vision.families import EMBEDDINGS
from lightkv.vision.tokens import Compressed, Tokens, removal

USUAL_STAGES = 3
MERGING = frozenset({"rounds", "distance"})
SHALLOW = 16  # fastv prunes decoders of fewer layers after layer 1, others after layer 2


@dataclass(frozen=True)
class Method:
    """One row of METHODS.

    compress      runs one stage on the tokens of one or several sequences
    plan          (depth, first layer allowed, stages or None for the usual number, retention) → the usual schedule
    cost          (vision tokens of one item, stage, config, frames, width) → tokens left, FLOPs of the stage
    scorer        (config, stage number) → computes scores in the layer before the stage, or None. A stage that needs
                  scores cannot run on the embeddings
    proportional  later layers attend to a merged token in proportion to its size
    reads         fields of LightKVConfig that the method uses; all others must keep their defaults
    """

    compress: Callable[[Tokens, Stage, Settings], Compressed]
    plan: Callable[[int, int, int | None, float], Plan]
    cost: Callable[[int, Stage, Settings, int, int], tuple[int, int]]
    scorer: Callable[[Settings, int], Scorer | None] = lambda config, number: None
    proportional: bool = False
    reads: frozenset[str] = frozenset()


def _published(tokens: Tokens, stage: Stage, config: Settings) -> Compressed:
    return published(tokens, stage.windows, stage.drop, config.frames_per_window, config.budget)


def _published_cost(vision: int, stage: Stage, config: Settings, frames: int, width: int) -> tuple[int, int]:
    span = None if config.windows == "released" else config.frames_per_window  # the release takes a video for one image
    return published_cost(vision, stage.windows, stage.drop, span, config.budget, frames, width)


def _spacetime(tokens: Tokens, stage: Stage, config: Settings) -> Compressed:
    return spacetime(tokens, stage.drop, config.rounds, config.distance)


def _spacetime_cost(vision: int, stage: Stage, config: Settings, frames: int, width: int) -> tuple[int, int]:
    return spacetime_cost(vision, stage.drop, config.rounds, width)


def _merged_then_asked(tokens: Tokens, stage: Stage, config: Settings) -> Compressed:
    """The first stage merges in space and time; later ones drop what the question attends to least."""
    return _spacetime(tokens, stage, config) if tokens.score is None else asked(tokens, stage.drop)


def _random(tokens: Tokens, stage: Stage, config: Settings) -> Compressed:
    return random(tokens, stage.drop, config.seed * 1_000_003 + stage.layer + 1)


def _by_drop(method: Callable[[Tokens, float], Compressed]) -> Callable[[Tokens, Stage, Settings], Compressed]:
    """`compress` of a method whose only number is the drop."""
    return lambda tokens, stage, config: method(tokens, stage.drop)


def _question(config: Settings, number: int) -> Scorer | None:
    return QuestionAttention() if number else None


def _asked_cost(vision: int, stage: Stage, config: Settings, frames: int, width: int) -> tuple[int, int]:
    cost = _spacetime_cost if stage == config.stages[0] else _pruning_cost
    return cost(vision, stage, config, frames, width)


def _votes(config: Settings, number: int) -> Scorer | None:
    rule = GUIDANCES[config.guidance]
    return None if isinstance(rule, UniformGuidance) else Votes(rule)


def _late(depth: int, first: int, stages: int | None, target: float) -> Plan:
    return derive(depth, max(first, 0), stages or USUAL_STAGES, target)


def _early(depth: int, first: int, stages: int | None, target: float) -> Plan:
    return derive_early(depth, first, stages, target)


def _fastv_plan(depth: int, first: int, stages: int | None, target: float) -> Plan:
    return derive_single(1 if depth < SHALLOW else 2, depth, first, stages, target)


def _pruning_cost(vision: int, stage: Stage, config: Settings, frames: int, width: int) -> tuple[int, int]:
    return vision - removal(vision, stage.drop), 0


def _tome_cost(vision: int, stage: Stage, config: Settings, frames: int, width: int) -> tuple[int, int]:
    return tome_cost(vision, stage.drop, width)


_at_once = partial(derive_single, EMBEDDINGS)

METHODS: dict[str, Method] = {
    "published": Method(
        _published,
        _late,
        _published_cost,
        scorer=_votes,
        reads=frozenset({"windows", "window_frames", "guidance", "budget"}),
    ),
    "lightkv": Method(_spacetime, _early, _spacetime_cost, scorer=_question, proportional=True, reads=MERGING),
    "spacetime": Method(_spacetime, _early, _spacetime_cost, proportional=True, reads=MERGING),
    "asked": Method(_merged_then_asked, _early, _asked_cost, scorer=_question, proportional=True, reads=MERGING),
    "random": Method(_random, _at_once, _pruning_cost, reads=frozenset({"seed"})),
    "stride": Method(_by_drop(stride), _at_once, _pruning_cost),
    "tome": Method(_by_drop(tome), _at_once, _tome_cost, proportional=True),
    "fastv": Method(_by_drop(fastv), _fastv_plan, _pruning_cost, scorer=lambda config, number: LastQuery()),
    "evs": Method(_by_drop(evs), _at_once, _pruning_cost),
}
