"""Runs every kind of cell of the benchmark once, at few sizes: it shows that they run, not how fast.

    python -m jobs.measure.gpu.small_benchmark FILE                    # operations, stages, prefill, decode
    python -m jobs.measure.gpu.small_benchmark FILE --suite engine

Writes a result file as the benchmark does. Exit code 1: a cell failed; the file says why.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from jobs.measure.benchmark.__main__ import ENGINE, cells, head, scale_of
from jobs.measure.benchmark.cell import FAILED, Cell, parts
from jobs.measure.benchmark.engine import suite as engine_suite
from jobs.measure.benchmark.engine.scale import EngineScale
from jobs.measure.benchmark.result import ResultFile
from jobs.measure.benchmark.run import SHARES, run
from jobs.measure.benchmark.scale import K, Scale
from jobs.measure.benchmark.timer import Timer

MINUTES = 3.0


def few(scale: Scale) -> Scale:
    """Two sizes per operation, two of the three models, batches of at most 4. A CPU's scale is small already."""
    if scale.device.type != "cuda":
        return scale
    return replace(
        scale,
        op_tokens=(1 * K, 8 * K),
        attend_most=8 * K,
        twin_most=2 * K,
        stage_tokens=(2 * K,),
        decoders=scale.decoders[1:],
        prefill_vision=(576, 8 * K),
        prefill_batches=(1, 2),
        decode_vision=2 * K,
        decode_batches=(1, 4),
        budget_s=0.05,
        copy_bytes=1 << 28,
    )


def few_of_engine(scale: EngineScale) -> EngineScale:
    """Videos of at most 10 minutes, one set of videos, one round."""
    return replace(
        scale,
        minutes=(1, 10),
        plain_minutes=1,
        units=(scale.units[0][:6],),
        compared=scale.compared[:2],
        rounds=1,
        budget_s=0.0,
        prompts=(1, 4),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cells; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="result file, replaced")
    parser.add_argument("--suite", nargs="+", choices=(*SHARES, ENGINE), default=list(SHARES))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args(arguments)
    if ENGINE in args.suite and len(args.suite) > 1:
        parser.error(f"--suite {ENGINE}: expected it by itself, got {' '.join(args.suite)}")
    device, limit_s = torch.device(args.device), 60 * MINUTES
    found: list[Cell]
    if args.suite == [ENGINE]:
        engine_scale = few_of_engine(engine_suite.scale_of(device))
        found, dtype, budget_s = engine_suite.cells(engine_scale), engine_scale.dtype, 0.0
    else:
        scale = few(scale_of(device))
        found, dtype, budget_s = cells(scale, args.suite), scale.dtype, scale.budget_s
    command = f"python -m jobs.measure.gpu.small_benchmark {args.file.name} --suite {' '.join(args.suite)}"
    result = ResultFile(args.file, head(device, dtype, command, limit_s), found)
    run(found, result, Timer(device, budget_s), {cell.suite: limit_s for cell in found})
    return int(any(part["status"] == FAILED for cell in result.cells for part in parts(cell)))


if __name__ == "__main__":
    sys.exit(main())
