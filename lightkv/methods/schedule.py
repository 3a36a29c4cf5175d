"""Derives schedules: the layers that stages follow and their drops, for a given retention of the vision KV."""

from collections.abc import Callable, Iterator, Sequence

from lightkv.errors import ConfigError

Plan = list[tuple[int, float]]  # (layer that a stage follows, share that it drops), in ascending layer order

USUAL_DROP = 0.5  # the most that one matching removes, and the drop that rounding in small windows changes least
FRACTIONS = (12 / 32, 24 / 32)  # the paper's first and last stage as a share of the depth
SECOND_STAGE, SECOND_DROP = 1 / 3, 0.2  # of derive_early, chosen on the embedded model's validation split


def kept_share(plan: Sequence[tuple[int, float]], depth: int) -> float:
    """The retention of `plan`: share of vision KV entries that `depth` layers hold, averaged over layers."""
    share, total, done = 1.0, 0.0, 0
    for layer, drop in plan:
        total, done = total + (layer + 1 - done) * share, layer + 1
        share *= 1.0 - drop
    return (total + (depth - done) * share) / depth


def derive(depth: int, first: int, stages: int, target: float) -> Plan:
    """A plan of `stages` stages after layers `first` … depth - 2 that keeps exactly `target`.

    Stages drop half and are spread like the paper's, as late as the target allows. The last stage's drop is adjusted
    to meet the target, or all drops are if one would change too much.
    Raises ConfigError if there are too few layers, or if even the largest drops keep more than `target`.
    """
    if depth - 1 - first < stages:
        raise ConfigError(
            f"{stages} stages do not fit: this decoder of {depth} layers takes at most {max(0, depth - 1 - first)}, "
            f"after layers {first} to {depth - 2}"
        )
    layers: list[int] = []
    for layers in _placements(depth, first, stages):
        if kept_share(_halving(layers), depth) <= target:
            break
    layers = _as_late_as(target, layers, depth)
    fine = [(layer, USUAL_DROP) for layer in layers[:-1]]
    if kept_share(_halving(layers), depth) <= target <= kept_share([*fine, (layers[-1], USUAL_DROP / 2)], depth):
        return _solve(lambda drop: [*fine, (layers[-1], drop)], depth, target)
    return _solve(lambda drop: [(layer, drop) for layer in layers], depth, target)


def derive_early(depth: int, first: int, stages: int | None, target: float) -> Plan:
    """A plan of one or two stages (None: two) that keeps exactly `target`; any target can be met if first is -1.

    The first stage comes as early as the model allows, so that merging repeated content saves memory in all layers.
    The second comes after a third of the layers, when the question's attention is informative. It drops
    0.2 · (1 - target); the first stage drops the rest.
    """
    if stages not in (None, 1, 2):
        raise ConfigError(f"this method has one or two stages, got stages={stages}")
    second = max(first + 1, round(depth * SECOND_STAGE) - 1)
    if first > depth - 2 or (stages == 2 and second > depth - 2):
        raise ConfigError(f"{stages or 1} stages do not fit a decoder of {depth} layers after layer {first}")
    if stages == 1 or second > depth - 2:
        return _solve(lambda drop: [(first, drop)], depth, target)
    later = SECOND_DROP * (1 - target)
    return _solve(lambda drop: [(first, drop), (second, later)], depth, target)


def derive_single(layer: int, depth: int, first: int, stages: int | None, target: float) -> Plan:
    """A plan of one stage, after `layer` or the first later layer that the model allows, that keeps `target`."""
    if stages not in (None, 1):
        raise ConfigError(
            f"this method is published with 1 stage, got stages={stages}: for more, pass the stages to LightKVConfig"
        )
    at = max(first, layer)
    if at > depth - 2:
        raise ConfigError(f"a stage after layer {at} does not fit a decoder of {depth} layers")
    return _solve(lambda drop: [(at, drop)], depth, target)


def _halving(layers: Sequence[int]) -> Plan:
    return [(layer, USUAL_DROP) for layer in layers]


def _fractions(stages: int) -> list[float]:
    """Places of `stages` stages as shares of the depth, spread like the paper's."""
    low, high = FRACTIONS
    return [low + (high - low) * number / max(1, stages - 1) for number in range(stages)]


def _rounded(places: Sequence[float], first: int, depth: int) -> list[int]:
    """Distinct layers near `places`, none before `first`, each leaving room for the later ones."""
    layers: list[int] = []
    for number, place in enumerate(places):
        least = layers[-1] + 1 if layers else first
        layers.append(min(max(round(place), least), depth - len(places) - 1 + number))
    return layers


def _placements(depth: int, first: int, stages: int) -> Iterator[list[int]]:
    """Yields stage layers from the latest possible, through an even spread like the paper's, to the earliest."""
    latest = [float(depth - stages - 1 + number) for number in range(stages)]
    even = _fractions(stages)
    spread = [place * (depth - 2) / even[-1] for place in even]
    for start, end in ((latest, spread), (spread, [0.0] * stages)):
        for step in range(4 * depth + 1):
            share = step / (4 * depth)
            yield _rounded([a + (b - a) * share for a, b in zip(start, end, strict=True)], first, depth)


def _as_late_as(target: float, layers: list[int], depth: int) -> list[int]:
    """Moves stages later, the last one first, while halving there still keeps no more than `target`."""
    layers = list(layers)
    for number in reversed(range(len(layers))):
        limit = layers[number + 1] - 1 if number + 1 < len(layers) else depth - 2
        while layers[number] < limit:
            moved = [*layers[:number], layers[number] + 1, *layers[number + 1 :]]
            if kept_share(_halving(moved), depth) > target:
                break
            layers = moved
    return layers


def _solve(plan: Callable[[float], Plan], depth: int, target: float) -> Plan:
    """The plan that keeps `target`, found by bisection over the drop that `plan` takes."""
    low, high = 0.0, 1.0 - 1e-9
    if kept_share(plan(high), depth) > target:
        raise ConfigError(
            f"retention {target} cannot be met: {len(plan(high))} stages in {depth} layers, the first after layer "
            f"{plan(high)[0][0]}, keep at least {kept_share(plan(high), depth):.3f}"
        )
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if kept_share(plan(middle), depth) <= target else (middle, high)
    return plan(round(high, 12))
