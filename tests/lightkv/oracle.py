"""Implements the published method as plain loops over Python numbers: the reference for the fast code."""

import math
from collections.abc import Sequence

Vector = list[float]
Place = tuple[int, int, int, int]  # item (−1 text, −2 fixed), t, y, x


def dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def divergence(a: Vector, b: Vector) -> float:
    norms = math.sqrt(dot(a, a) * dot(b, b))
    return 1.0 - (dot(a, b) / norms if norms else 0.0)


def guidance(q: list[list[Vector]], k: list[list[Vector]], text: Sequence[bool], scale: float) -> Vector:
    """q [heads][S][d], k [key heads][S][d] → g [S]."""
    length, group = len(text), len(q) // len(k)
    g = [0.0] * length
    for head, queries in enumerate(q):
        for j in range(length):
            if text[j]:
                scores = [dot(query, k[head // group][j]) * scale for query in queries]
                highest = max(scores)
                total = math.fsum(math.exp(score - highest) for score in scores)
                for i in range(length):
                    g[i] += math.exp(scores[i] - highest) / total
    return g


def asked(q: list[list[Vector]], k: list[list[Vector]], items: Sequence[int], scale: float) -> Vector:
    """Per position, the largest attention from a text token after all vision, over heads; softmax over vision only."""
    length, group = len(items), len(q) // len(k)
    vision = [i for i in range(length) if items[i] != -1]
    asking = [i for i in range(length) if items[i] == -1 and all(j < i for j in vision)]
    most = [0.0] * length
    for head in range(len(q)):
        for i in asking:
            scores = {j: dot(q[head][i], k[head // group][j]) * scale for j in vision}
            highest = max(scores.values(), default=0.0)
            total = math.fsum(math.exp(score - highest) for score in scores.values())
            for j in vision:
                most[j] = max(most[j], math.exp(scores[j] - highest) / total)
    return most


def band(position: int, extent: int, count: int) -> int:
    """The band of a row, if the first `extent mod count` of `count` bands are one row taller."""
    first = 0
    for number in range(count):
        first += extent // count + (1 if number < extent % count else 0)
        if position < first:
            return number
    raise AssertionError("position outside the grid")


def stage(
    hidden: list[Vector],
    g: Vector,
    places: Sequence[Place],
    grids: Sequence[tuple[int, int, int]],
    windows: int,
    drop: float,
    frames: int | None = 1,
    budget: str = "window",
) -> tuple[list[Vector], list[int], list[int]]:
    """→ (hidden states of the survivors, their original indices, target of each token)."""
    x, weight = [list(vector) for vector in hidden], list(g)
    target = list(range(len(x)))
    cells: dict[tuple[int, ...], list[int]] = {}
    for index, (item, t, row, column) in enumerate(places):
        if item >= 0:
            _, h, w = grids[item]
            time = t // frames if frames else 0
            cells.setdefault((item, time, band(row, h, windows), band(column, w, windows)), []).append(index)
    shares = spread(cells, drop)
    for cell, members in sorted(cells.items()):
        members.sort(key=lambda index: places[index][1:])
        quota = shares[cell] if budget == "item" else math.floor(drop * len(members) + 1e-9)
        while quota > 0:
            merged = match_once(x, weight, members, min(quota, len(members) // 2))
            quota -= len(merged)
            for a, b in merged.items():
                members.remove(a)
                target = [b if end == a else end for end in target]
    kept = [index for index in range(len(x)) if target[index] == index]
    return [x[index] for index in kept], kept, target


def spread(cells: dict[tuple[int, ...], list[int]], drop: float) -> dict[tuple[int, ...], int]:
    """Removals per window if an item removes floor(drop · M) of its M tokens, and no window its last one."""
    shares = {}
    for item in {cell[0] for cell in cells}:
        own = sorted(cell for cell in cells if cell[0] == item)
        room = sum(len(cells[cell]) - 1 for cell in own)
        wanted = min(math.floor(drop * sum(len(cells[cell]) for cell in own) + 1e-9), room)
        seen = given = 0
        for cell in own:
            seen += len(cells[cell]) - 1
            shares[cell] = wanted * seen // max(room, 1) - given
            given += shares[cell]
    return shares


def match_once(x: list[Vector], weight: Vector, members: list[int], count: int) -> dict[int, int]:
    """Merges the `count` least divergent a's of one window into their b's, in place; → {a: b}."""
    set_a, set_b = members[0::2], members[1::2]
    choices = []
    for order, a in enumerate(set_a):
        best = min(range(len(set_b)), key=lambda number: (divergence(x[a], x[set_b[number]]), number))
        choices.append((divergence(x[a], x[set_b[best]]), order, a, set_b[best]))
    merged = {a: b for _, _, a, b in sorted(choices)[:count]}
    for b in set(merged.values()):
        givers = [a for a, into in merged.items() if into == b]
        group = [b, *givers]
        shares = [weight[index] for index in group]
        if sum(shares) == 0:
            shares = [1.0] * len(group)
        x[b] = [
            math.fsum(share * x[index][d] for share, index in zip(shares, group, strict=True)) / math.fsum(shares)
            for d in range(len(x[b]))
        ]
        weight[b] += math.fsum(weight[a] for a in givers)
    return merged


def squared(places: Sequence[Place]) -> tuple[list[Place], list[tuple[int, int, int]]]:
    """The release's grid: each item's n tokens, row by row, on a square of side ceil(sqrt(n))."""
    count: dict[int, int] = {}
    for item, *_ in places:
        if item >= 0:
            count[item] = count.get(item, 0) + 1
    side = {item: math.isqrt(n - 1) + 1 for item, n in count.items()}
    seen: dict[int, int] = dict.fromkeys(count, 0)
    laid: list[Place] = []
    for item, *_ in places:
        if item < 0:
            laid.append((item, 0, 0, 0))
        else:
            laid.append((item, 0, seen[item] // side[item], seen[item] % side[item]))
            seen[item] += 1
    return laid, [(1, side.get(item, 0), side.get(item, 0)) for item in range(max(count, default=-1) + 1)]
