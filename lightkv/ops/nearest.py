"""Finds for each token of a set A the nearest token of its group's set B, by features and position.

    d(a, b) = ‖s_a x_a‖² / 2 + ‖s_b x_b‖² / 2 − s_a s_b ⟨x_a, x_b⟩ + λ ‖p_a − p_b‖₂

The first three terms are ‖s_a x_a − s_b x_b‖² / 2, clamped at 0. With s = 1/‖x‖ and λ = 0, d is 1 − cos. Thus one
operation serves the spatio-temporal method (s = 1 / root mean square length in the item) and the published one. For a
zero vector d and 1 − cos differ: d to a vector of length 1 is 1/2, while 1 − cos is defined as 1.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lightkv.errors import ConfigError
from lightkv.ops.dispatch import use_triton
from lightkv.ops.ragged import Groups

SCORES_AT_ONCE = 1 << 24  # fp32 differences in memory at once in the twin: 64 MiB
FEATURES_AT_ONCE = 1 << 25  # fp32 features in memory at once in the twin: 128 MiB, but at least one set B
EXACT = "donot_use_mm_for_euclid_dist"  # exact for positions, because they are small numbers
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def nearest(
    hidden: Tensor, scale: Tensor, place: Tensor | None, groups: Groups, distance: float
) -> tuple[Tensor, Tensor]:
    """Returns each a's nearest b and d(a, b), by slot of `order`: closest int64 [N], positions; apart fp32 [N].

    The values are −1 and inf for tokens of B, for groups without B, and where no difference is finite. Ties go to the b
    that is first in `order`. Differences are fp32.

    hidden    [S, D]
    scale     fp32 [S]: s
    place     fp32 [S, 3]: p; may be None if distance is 0
    groups    sets A and B of each group; order holds positions in hidden
    distance  λ ≥ 0

    Raises ConfigError for other shapes, types and numbers. The values in tensors are not checked.
    """
    _check(hidden, scale, place, groups, distance)
    if use_triton(hidden):
        from lightkv.ops.nearest_kernel import nearest_triton

        return nearest_triton(hidden, scale, place, groups, distance)
    return nearest_torch(hidden, scale, place, groups, distance)


def nearest_torch(
    hidden: Tensor, scale: Tensor, place: Tensor | None, groups: Groups, distance: float
) -> tuple[Tensor, Tensor]:
    """The twin: batches of groups of similar size, padded to the largest."""
    order, starts, middles = groups.order, groups.starts, groups.middles
    closest = torch.full_like(order, -1)
    apart = torch.full(order.shape, torch.inf, dtype=torch.float32, device=order.device)
    for group, most_a, most_b in _chunks(starts, middles, hidden.shape[1]):
        slot_b, missing = _slots(middles[group], starts[group + 1], 0, most_b)
        token_b = order[slot_b]
        features_b, half_b = _features(hidden, scale, token_b)
        step = max(1, min(SCORES_AT_ONCE // most_b, FEATURES_AT_ONCE // max(1, hidden.shape[1])) // len(group))
        for begin in range(0, most_a, step):
            slot_a, absent = _slots(starts[group], middles[group], begin, min(step, most_a - begin))
            token_a = order[slot_a]
            features_a, half_a = _features(hidden, scale, token_a)
            differ = half_a[:, :, None] + half_b[:, None]
            differ -= torch.bmm(features_a, features_b.transpose(1, 2))
            differ.clamp_(min=0)
            if distance and place is not None:
                differ += distance * torch.cdist(place[token_a], place[token_b], compute_mode=EXACT)
            if missing is not None:
                differ.masked_fill_(missing[:, None], torch.inf)
            least, which = differ.nan_to_num_(nan=torch.inf, posinf=torch.inf).min(dim=-1)
            token = token_b.gather(1, which).masked_fill_(least == torch.inf, -1)
            if absent is not None:
                slot_a, token, least = slot_a[~absent], token[~absent], least[~absent]
            closest[slot_a], apart[slot_a] = token, least
    return closest, apart


def _slots(first: Tensor, end: Tensor, begin: int, count: int) -> tuple[Tensor, Tensor | None]:
    """Returns slots [C, count] from first + begin on, and a mask of padding slots; None for one group (no padding)."""
    slot = first[:, None] + torch.arange(begin, begin + count, device=first.device)
    if len(first) == 1:
        return slot, None
    missing = slot >= end[:, None]
    return slot.masked_fill_(missing, 0), missing


def _features(hidden: Tensor, scale: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """Returns s x in fp32 [..., D], and half of its squared length."""
    features = hidden[token].float() * scale[token][..., None]
    return features, features.square().sum(dim=-1) / 2


def _chunks(starts: Tensor, middles: Tensor, width: int) -> Iterator[tuple[Tensor, int, int]]:
    """Yields bounded batches of groups of similar size: (group numbers, largest set A, largest set B)."""
    of_a, of_b = middles - starts[:-1], starts[1:] - middles
    group = torch.nonzero((of_a > 0) & (of_b > 0)).flatten()
    group = group[torch.argsort((of_a + of_b)[group], descending=True, stable=True)]
    counts = list(zip(of_a[group].tolist(), of_b[group].tolist(), strict=True))
    first = 0
    while first < len(counts):
        most_a, most_b, last = *counts[first], first + 1
        while last < len(counts) and 2 * sum(counts[last]) > sum(counts[first]):
            next_a, next_b, many = max(most_a, counts[last][0]), max(most_b, counts[last][1]), last + 1 - first
            if many * next_a * next_b > SCORES_AT_ONCE or many * (next_a + next_b) * width > FEATURES_AT_ONCE:
                break
            most_a, most_b, last = next_a, next_b, last + 1
        yield group[first:last], most_a, most_b
        first = last


def _check(hidden: Tensor, scale: Tensor, place: Tensor | None, groups: Groups, distance: float) -> None:
    if hidden.ndim != 2 or hidden.dtype not in DTYPES:
        raise ConfigError(f"hidden must be floating-point [S, D], got {hidden.dtype} {list(hidden.shape)}")
    if scale.dtype != torch.float32 or scale.shape != hidden.shape[:1]:
        raise ConfigError(f"scale must be fp32 [{len(hidden)}], got {scale.dtype} {list(scale.shape)}")
    if not (math.isfinite(distance) and distance >= 0):
        raise ConfigError(f"distance must be finite and at least 0, got {distance}")
    if distance and place is None:
        raise ConfigError(f"place must be given if distance is not 0, got None with distance {distance}")
    if place is not None and (place.dtype != torch.float32 or place.shape != (len(hidden), 3)):
        raise ConfigError(f"place must be fp32 [{len(hidden)}, 3], got {place.dtype} {list(place.shape)}")
    for name, tensor in (("order", groups.order), ("starts", groups.starts), ("middles", groups.middles)):
        if tensor.dtype != torch.int64 or tensor.ndim != 1:
            raise ConfigError(f"{name} must be int64 with one dimension, got {tensor.dtype} {list(tensor.shape)}")
    if len(groups.starts) != len(groups.middles) + 1:
        counts = f"{len(groups.middles)} middles, got {len(groups.starts)}"
        raise ConfigError(f"starts must have one more than the {counts}")
    if groups.largest < 0:
        raise ConfigError(f"largest must be at least 0, got {groups.largest}")
