"""Suite "ops": the operations of lightkv/ops at one decoder's shape, and the device's copy and matmul rates."""

from functools import partial

import torch

from jobs.measure.benchmark.cell import Cell, Values
from jobs.measure.benchmark.derive import COPY, MATMUL
from jobs.measure.benchmark.ops.attend import SEQUENCES, decode, packed, prefill
from jobs.measure.benchmark.ops.bytes import pair_flops
from jobs.measure.benchmark.ops.op import Op
from jobs.measure.benchmark.ops.tokens import angles, compacting, merging, nearest_in_blocks, nearest_in_windows, votes
from jobs.measure.benchmark.run import timing
from jobs.measure.benchmark.scale import K, Scale
from jobs.measure.benchmark.timer import Timer

TWIN_MOST = 64 * K
PREFILL, DECODE = "attend, prefill", "attend, decode"
PACKED = f"attend, {SEQUENCES} packed prefills"
COMPACTIONS = {"merge and compact a tenth": 10, "merge and compact half": 2}
ANGLES = "angles of the half that is left"


def cells(scale: Scale) -> list[Cell]:
    """Cells of the two rates, then of every operation at every size."""
    return [
        Cell("ops", COPY, {"bytes": scale.copy_bytes}, partial(_copy, scale)),
        Cell("ops", MATMUL, {"side": scale.matmul_side}, partial(_matmul, scale)),
        *(
            Cell("ops", op.name, {"tokens": tokens}, partial(op.measure, scale, tokens))
            for op in operations(scale)
            for tokens in scale.op_tokens
            if op.name not in (PREFILL, PACKED) or tokens <= scale.attend_most
        ),
    ]


def operations(scale: Scale) -> tuple[Op, ...]:
    first, last = (scale.op_schedule.stages[number].windows for number in (0, -1))
    return (
        Op("nearest, blocks of 1024", nearest_in_blocks, TWIN_MOST),
        Op(f"nearest, {first} × {first} windows", partial(nearest_in_windows, stage=0), TWIN_MOST),
        Op(f"nearest, {last} × {last} windows", partial(nearest_in_windows, stage=-1), TWIN_MOST),
        Op("merge a tenth", partial(merging, one_in=10), TWIN_MOST),
        Op("merge half", partial(merging, one_in=2), TWIN_MOST),
        *(Op(name, partial(compacting, one_in=one_in), TWIN_MOST) for name, one_in in COMPACTIONS.items()),
        Op(ANGLES, angles, scale.op_tokens[-1]),
        Op("softmax_votes, sum", partial(votes, reduce="sum"), TWIN_MOST),
        Op("softmax_votes, max", partial(votes, reduce="max"), TWIN_MOST),
        Op(PREFILL, prefill, scale.twin_most),
        Op(PACKED, packed, scale.twin_most),
        Op(DECODE, decode, TWIN_MOST),
    )


def _copy(scale: Scale, timer: Timer) -> Values:
    """Time a copy, which reads and writes every byte once."""
    source = torch.zeros(scale.copy_bytes, dtype=torch.int8, device=scale.device)
    target = torch.empty_like(source)
    return {"bytes": 2 * scale.copy_bytes, **timing(timer, lambda: target.copy_(source))}


def _matmul(scale: Scale, timer: Timer) -> Values:
    """Time a square matrix product in the model's dtype."""
    side = scale.matmul_side
    a, b = (torch.randn(side, side, device=scale.device, dtype=scale.dtype) for _ in range(2))
    return {"flops": pair_flops(side * side, side), **timing(timer, lambda: a @ b)}
