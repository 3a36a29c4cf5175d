"""Minimal memory traffic of each operation in bytes: every input is read once, every output written once.

D hidden size, d head dimension, e bytes of an element of the model's dtype; scores, sizes and biases are fp32 (4) and
indices int64 (8). An operation with a second pass (such as a softmax along the long side) cannot reach this.
"""

FP32, INT64 = 4, 8


def nearest_bytes(tokens: int, groups: int, width: int, element: int, places: bool) -> int:
    """hidden N·D·e, s 4, p 3 · 4 and order 8 per token; starts and middles 8 each per group; closest 8, apart 4."""
    per_token = width * element + FP32 + 3 * FP32 * places + INT64 + INT64 + FP32
    return tokens * per_token + (2 * groups + 1) * INT64


def merge_bytes(sources: int, targets: int, width: int, element: int) -> int:
    """Sources are read, distinct targets are read and written: (R + 2T)·D·e + (R + 2T)·4, and R pairs of indices."""
    return (sources + 2 * targets) * (width * element + FP32) + 2 * sources * INT64


def compact_bytes(sources: int, kept: int, width: int, element: int, columns: int) -> int:
    """Kept rows and sources are read, kept rows written: (R + 2K)·D·e + (R + 2K)·4; K·C integers read and written.

    Indices: R pairs and K kept rows.
    """
    rows = (sources + 2 * kept) * (width * element + FP32)
    return rows + (2 * kept * columns + 2 * sources + kept) * INT64


def angles_bytes(tokens: int, axes: int, tables: int, dims: int, element: int) -> int:
    """Positions 8 per axis, and cos and sin of d numbers in each of the tables."""
    return tokens * (axes * INT64 + 2 * tables * dims * element)


def votes_bytes(long: int, long_heads: int, short: int, short_heads: int, dims: int, element: int) -> int:
    """(N·Hl + M·Hs)·d·e for both sides, 8 per index, 4 per result, and the starts of one sequence."""
    states = (long * long_heads + short * short_heads) * dims * element
    return states + (long + short) * INT64 + long * FP32 + 4 * INT64


def attend_bytes(queries: int, keys: int, heads: int, key_heads: int, dims: int, element: int) -> int:
    """q and out 2·L·Hq·d·e, k and v 2·K·Hkv·d·e, bias 4 per key."""
    return 2 * (queries * heads + keys * key_heads) * dims * element + keys * FP32


def attend_packed_bytes(tokens: int, sequences: int, heads: int, key_heads: int, dims: int, element: int) -> int:
    """attend_bytes with as many queries as keys, and 8 per sequence start on both sides."""
    return attend_bytes(tokens, tokens, heads, key_heads, dims, element) + 2 * (sequences + 1) * INT64


def pair_flops(pairs: int, width: int) -> int:
    """FLOPs of inner products: one multiply and one add per element."""
    return 2 * pairs * width


def causal_flops(tokens: int, heads: int, dims: int) -> int:
    """FLOPs of scores and values over the S (S + 1) / 2 pairs under a causal mask."""
    return 2 * pair_flops(tokens * (tokens + 1) // 2, heads * dims)
