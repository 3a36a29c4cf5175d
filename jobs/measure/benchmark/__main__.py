"""Time operations, stages, prefill and decode with and without compression, and write one JSON file.

    python -m jobs.measure.benchmark --device cuda --json jobs/results/benchmark-h200.json     # 8 minutes at most
    python -m jobs.measure.benchmark --device cuda --minutes 3 --models qwen2.5-vl-7b --json FILE     # one model
    python -m jobs.measure.benchmark --device cpu --json FILE     # small sizes, in seconds; says nothing about speed
    python -m jobs.measure.benchmark --device cpu --suite engine --json FILE     # long videos, many answers at once
    python -m jobs.measure.readme     # write its tables into the pages

Weights are random, except the engine's on a CPU, and nothing is downloaded. The file has every cell from the start, as
not measured, and is replaced after each cell, so that a run that ends early keeps its results. Exit code 1: a cell
failed for another reason than memory or time; the file says which.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from jobs.measure.benchmark import decode, prefill, stage
from jobs.measure.benchmark.cell import FAILED, Cell, Values, parts
from jobs.measure.benchmark.decoder import Resident
from jobs.measure.benchmark.ops import suite as ops
from jobs.measure.benchmark.result import ResultFile, device, versions
from jobs.measure.benchmark.run import SHARES, ends, run
from jobs.measure.benchmark.scale import Scale, on_cpu, on_gpu
from jobs.measure.benchmark.timer import Timer

ENGINE = "engine"  # must run alone: it needs the pipeline, and its results on a CPU are meaningful
MINUTES = 7.5  # eight with imports and the last cell


def scale_of(kind: torch.device) -> Scale:
    """Real sizes for a GPU, small ones for a CPU."""
    if kind.type == "cuda":
        return on_gpu(kind, torch.cuda.get_device_properties(kind).total_memory)
    return on_cpu(kind)


def cells(scale: Scale, suites: Sequence[str], models: Sequence[str] = ()) -> list[Cell]:
    """All cells of the suites, in the order of measurement; `models` restricts prefill and decode to these models."""
    resident = Resident(scale.device, scale.dtype)
    some = replace(scale, decoders=tuple(d for d in scale.decoders if not models or d.name in models))
    of_suite = {
        "ops": lambda: ops.cells(scale),
        "stage": lambda: stage.cells(scale),
        "prefill": lambda: prefill.cells(some, resident),
        "decode": lambda: decode.cells(some, resident),
    }
    return [cell for suite in suites for cell in of_suite[suite]()]


def head(on: torch.device, dtype: torch.dtype, command: str, limit_s: float, **more: Any) -> Values:
    """The header of the result file: command, device, dtype and versions."""
    return {
        "command": command,
        "device": device(on),
        "dtype": str(dtype).removeprefix("torch."),
        **more,
        "versions": versions(),
        "limit_s": limit_s,
        "spent_s": 0.0,
    }


def engine(on: torch.device, command: str, limit_s: float) -> tuple[list[Cell], dict[str, float], Values]:
    """Cells of the engine's suite, the share of time of each part, and the header of its file."""
    from jobs.measure.benchmark.engine import suite

    scale = suite.scale_of(on)
    return suite.cells(scale), suite.SHARES, head(on, scale.dtype, command, limit_s)


def main(arguments: Sequence[str] | None = None) -> int:
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="result file; replaced")
    parser.add_argument(
        "--suite", nargs="+", choices=(*SHARES, ENGINE), default=list(SHARES), help=f"default: all but {ENGINE}"
    )
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, metavar="N", help=f"start no cell after this time ({MINUTES})"
    )
    parser.add_argument(
        "--models", nargs="+", default=[], metavar="NAME", help="prefill and decode only of these models; default: all"
    )
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected a GPU that torch can use, found none; --device cpu runs small sizes")
    if args.minutes <= 0:
        parser.error(f"--minutes: expected more than 0, got {args.minutes}")
    if ENGINE in args.suite and len(args.suite) > 1:
        parser.error(f"--suite {ENGINE}: expected no other suite, got {' '.join(args.suite)}")
    if args.models and ENGINE in args.suite:
        parser.error(f"--models: --suite {ENGINE} has its own model")
    suites = [suite for suite in (*SHARES, ENGINE) if suite in args.suite]
    on = torch.device(args.device)
    which = "" if suites == list(SHARES) else f" --suite {' '.join(suites)}"
    some = f" --models {' '.join(args.models)}" if args.models else ""
    limit = "" if args.minutes == MINUTES else f" --minutes {args.minutes:g}"
    command = f"python -m jobs.measure.benchmark --device {args.device} --json {args.json.name}{which}{some}{limit}"
    limit_s = 60 * args.minutes
    if suites == [ENGINE]:
        found, shares, header = engine(on, command, limit_s)
        timer = Timer(on, 0.0)
    else:
        scale = scale_of(on)
        names = [decoder.name for decoder in scale.decoders]
        if unknown := sorted(set(args.models) - set(names)):
            parser.error(f"--models: expected some of {names}, got {unknown}")
        found, shares = cells(scale, suites, args.models), {suite: SHARES[suite] for suite in suites}
        header = head(on, scale.dtype, command, limit_s, shape=vars(scale.shape))  # of operations and stages
        timer = Timer(on, scale.budget_s)
    result = ResultFile(args.json, header, found)
    run(found, result, timer, ends(shares, limit_s - (time.perf_counter() - started)))
    return int(any(part["status"] == FAILED for cell in result.cells for part in parts(cell)))


if __name__ == "__main__":
    sys.exit(main())
