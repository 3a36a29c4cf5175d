"""Measure how much of the model's accuracy each method keeps, per retention, suite and task.

    python -m jobs.measure.evaluate --config configs/evaluate.yaml --out DIR --procs 2
    python -m jobs.measure.evaluate --config configs/evaluate.yaml --out DIR --scenes 8 --suites videos-small  # quick
    python -m jobs.measure.evaluate --config configs/evaluate.yaml --out DIR --report-only  # tables

Renders scenes with known answers, encodes them once with the main job's encoder, and asks through transformers'
`generate` or lightkv's engine. Frames are arrays, without the losses of video coding. Writes answers.parquet (every raw
answer, the truth and the plain model's answer), summary.json, table.md and figure.png into DIR. DIR/cells holds
finished cells (suite × method × retention): the same command continues where it stopped. Cells with another
configuration or other weights are asked again. Changed code alone repeats nothing; the summary lists the code versions
of the answers.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import transformers

from jobs.cli import main_guard
from jobs.measure.evaluate.answers import Shards, part_path, weights_id, write_part
from jobs.measure.evaluate.config import PLAIN, Cell, EvaluateConfig, cell_key, cells_of, load_evaluate_config
from jobs.measure.evaluate.figure import draw
from jobs.measure.evaluate.methods import treatment
from jobs.measure.evaluate.report import as_json, markdown
from jobs.measure.evaluate.summary import summarise, with_plain
from lightkv import LightKVError
from pipeline.captioning.models import describe
from pipeline.errors import ConfigError


def evaluate(config: EvaluateConfig, out: Path, procs: int, command: str) -> None:
    """Answer the open cells, with a line of progress per cell, then write `answers.parquet`."""
    card = describe(config.model)
    weights = weights_id(card)
    cells = {cell: part_path(out, cell, cell_key(config, cell, weights)) for cell in cells_of(config)}
    for line in dict.fromkeys(_unreachable(config, cell, card.config) for cell in cells):
        print(line, end="", file=sys.stderr)
    open_cells = [cell for cell, path in cells.items() if not path.exists()]
    print(f"{len(cells)} cells, {len(cells) - len(open_cells)} of them finished", flush=True)
    if open_cells:
        _ask(config, open_cells, cells, procs)
    parts = [pq.read_table(path) for path in cells.values()]
    made = [json.loads(part.schema.metadata[b"made"]) for part in parts]
    run = {
        **{"command": command, "model": config.model.name, "weights": weights},
        **{"split": config.split, "seed": config.seed, "config": config.model_dump(mode="json")},
        **{"answers": sum(part.num_rows for part in parts), "seconds": sum(cell["seconds"] for cell in made)},
        "code_versions": sorted({cell["code_version"] for cell in made}),
        "devices": sorted({cell["device"] for cell in made}),
        "torch": sorted({cell["torch"] for cell in made}),
        **{"processes": procs, "python": platform.python_version(), "numpy": np.__version__},
        "transformers": transformers.__version__,
    }
    answers = with_plain(pa.concat_tables([part.replace_schema_metadata() for part in parts]))
    answers = answers.replace_schema_metadata({"run": json.dumps(run)})
    pq.write_table(answers, out / "answers.parquet", compression="zstd")


def _ask(config: EvaluateConfig, open_cells: list[Cell], paths: dict[Cell, Path], procs: int) -> None:
    work = {cell: config.suites[cell.suite].scenes for cell in open_cells}
    started, done = time.perf_counter(), 0
    with Shards(config, procs) as shards:
        for number, cell in enumerate(open_cells, start=1):
            before = time.perf_counter()
            rows = shards.ask(cell)
            now = time.perf_counter()
            write_part(paths[cell], rows, now - before)
            done += work[cell]
            left_s = (now - started) / done * (sum(work.values()) - done)
            print(f"[{number}/{len(open_cells)}] {_line(cell, rows, now - before)}, {_clock(left_s)} left", flush=True)


def _line(cell: Cell, rows: list[dict[str, Any]], seconds: float) -> str:
    name = f"{cell.suite} {cell.method} {cell.retention:.0%}"
    if rows[0]["error"]:
        return f"{name}: –"
    right, reached = (np.mean([row[key] for row in rows]) for key in ("right", "reached"))
    return f"{name}: {right:.3f} right at {reached:.1%}, {len(rows) / seconds:.1f} answers/s"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _unreachable(config: EvaluateConfig, cell: Cell, model_config: Any) -> str:
    """A line that says why a cell cannot be reached, if that is known in advance; else empty.

    Raises `ConfigError` for a wrongly configured method.
    """
    if cell.method == PLAIN:
        return ""
    try:
        treatment(config, cell.method, config.suites[cell.suite], cell.retention, model_config)
    except LightKVError as error:
        return f"{cell.method} {cell.retention:.0%}: – ({error})\n"
    return ""


def report(config: EvaluateConfig, out: Path) -> None:
    """Write `summary.json`, `table.md` and `figure.png` from `answers.parquet`."""
    path = out / "answers.parquet"
    if not path.exists():
        raise ConfigError(f"--report-only: expected {path}, found none; run without it first")
    answers = pq.read_table(path)
    run = json.loads(answers.schema.metadata[b"run"])
    summary = summarise(answers, config)
    if not summary.figures:
        raise ConfigError(f"{path} holds none of the suites {', '.join(config.suites)}; run without --report-only")
    (out / "summary.json").write_text(json.dumps(as_json(summary, run), indent=1) + "\n", encoding="utf-8")
    (out / "table.md").write_text(markdown(summary, config, run), encoding="utf-8")
    title = f"Accuracy of short answers kept, with 95 % intervals: {run['model']}, split {run['split']}"
    drawn = [line for line in summary.figures if line.method == PLAIN or config.methods[line.method].drawn]
    draw(drawn, title).save(out / "figure.png", optimize=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="see configs/evaluate.yaml")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--report-only", action="store_true", help="remake table and figure from DIR/answers.parquet")
    parser.add_argument("--suites", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these and the plain model")
    parser.add_argument(
        "--retentions", nargs="+", type=float, metavar="SHARE", help="these instead of the configured ones"
    )
    parser.add_argument(
        "--scenes", type=int, metavar="N", help="scenes of every suite, instead of the configured number"
    )
    parser.add_argument("--procs", type=int, default=1, help="processes of one torch thread each; 1: this process only")
    args = parser.parse_args(arguments)
    if args.procs < 1:
        parser.error(f"--procs: expected at least 1, got {args.procs}")
    config = load_evaluate_config(args.config).narrowed(args.suites, args.methods, args.retentions, args.scenes)
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.report_only:
        words = sys.argv[1:] if arguments is None else arguments
        evaluate(config, args.out, args.procs, f"python -m jobs.measure.evaluate {shlex.join(words)}")
    report(config, args.out)
    print((args.out / "table.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    main_guard(main)
