"""Fill the pages with figures from the result files: each section between its own pair of markers.

python -m jobs.measure.readme
"""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from jobs.cli import main_guard
from jobs.measure.benchmark.readme import engine, longest, speed
from jobs.measure.evaluate.readme import fidelity, quality
from jobs.measure.markers import between

Result = dict[str, Any]


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "jobs/results"
PAGES: dict[str, tuple[str, ...]] = {
    "README.md": ("quality", "memory"),
    "jobs/results/README.md": ("fidelity", "benchmark", "engine", "manifest", "scale", "pipeline", "soak"),
}  # page → its sections


def filled(page: str, sections: Iterable[str], results: Path) -> str:
    """The page with its sections filled in. Raises ConfigError unless each has exactly one pair of markers."""
    for name in sections:
        files, text = SECTIONS[name]
        found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob(files))]
        page = between(page, f"<!-- {name} -->", f"<!-- /{name} -->", text(found))
    return page


def _one(text: Callable[[Result], str], command: str) -> Callable[[Sequence[Result]], str]:
    """A section from a single result, or a note that there is none."""
    return lambda results: text(results[0]) if results else f"No figure yet (`python -m {command}`)."


def manifest(result: Result) -> str:
    """Table of the seconds and memory of a run's bookkeeping, a line per size."""
    rows = [
        (
            f"{size['units']:,}",
            *(_seconds(size[f"{name}_s"]) for name in ("plan", "resume", "summary", "retry")),
            f"{size['memory_mib']:.0f} MiB",
        )
        for size in result["sizes"]
    ]
    return _table(
        f"`{result['command']}` ({result['machine']}, pyarrow {result['pyarrow']}; median of {result['repeats']} runs, "
        "spread in `jobs/results/manifest.json`):",
        ("units in the manifest", "planning", "open half found", "its summary", "its errors repeated", "memory"),
        rows,
    )


def scale(result: Result) -> str:
    """Table of one run of very many units."""
    (size,) = result["sizes"]
    stopped, resumed = size["stopped"], size["resumed"]
    memory = [max(stopped["peak_bytes"][k], resumed["peak_bytes"][k]) for k in ("driver", "object_store", "attempts")]
    rows = [
        ("planning; the manifest on disk", f"{_seconds(size['plan_s'])}; {_bytes(size['manifest_bytes'])}"),
        ("graph and files", f"{resumed['units_per_s']:,.0f} units per second"),
        (
            f"asked to end with {size['units'] - stopped['done']:,} units open, until everything finished is committed",
            _seconds(stopped["drain_s"]),
        ),
        ("the same command again, finding the open ones", _seconds(resumed["prepare_s"])),
        ("summary of all rows", _seconds(size["summary_s"])),
        ("peak memory: driver, object store, count of attempts", ", ".join(map(_bytes, memory))),
        ("data files, checkpoint files", f"{size['data_files']:,}, {size['checkpoint_files']:,}"),
    ]
    return _table(
        f"`{result['command']}` ({result['machine']}, ray {result['versions']['ray']}; one run):",
        (f"{size['units']:,} units", ""),
        rows,
    )


def soak(result: Result) -> str:
    """A sentence with the soak's kills and its wrong rows."""
    kills = ", ".join(f"{victim} {count:,}" for victim, count in result["kills"].items())
    wrong = ", ".join(f"{result[name]['units']:,} {name}" for name in ("lost", "doubled", "foreign"))
    return (
        f"`{result['command']}` ({result['machine']}, ray {result['versions']['ray']}): hit at random {kills}; "
        f"{result['driver_starts']:,} starts of the driver; of {result['units']:,} units {wrong}."
    )


def pipeline(result: Result) -> str:
    """A sentence with the pipeline's overhead on top of its model."""
    return (
        f"{_percent(result['overhead'])} more, median of {result['repeats']} runs over {result['clips']:,} clips, "
        f"least to most: {result['added_ms_per_clip']['median']:.1f} ms on top of "
        f"{result['engine_ms_per_clip']['median']:.1f} a clip (`{result['command']}`; {result['machine']}, torch "
        f"{result['versions']['torch']}, ray {result['versions']['ray']})."
    )


SECTIONS: dict[str, tuple[str, Callable[[Sequence[Result]], str]]] = {
    "quality": ("fidelity/summary.json", _one(quality, "jobs.measure.evaluate")),
    "memory": ("engine-*.json", longest),
    "fidelity": ("fidelity/summary.json", _one(fidelity, "jobs.measure.evaluate")),
    "benchmark": ("benchmark-*.json", speed),
    "engine": ("engine-*.json", engine),
    "manifest": ("manifest.json", _one(manifest, "jobs.measure.manifest")),
    "scale": ("scale.json", _one(scale, "jobs.measure.scale")),
    "pipeline": ("pipeline.json", _one(pipeline, "jobs.measure.pipeline")),
    "soak": ("soak.json", _one(soak, "jobs.measure.soak")),
}  # name of the markers → result files, function that writes the section


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = (f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))
    return "\n".join([title, "", *lines])


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value >= 10 else f"{value:.2g} s"


def _bytes(value: float) -> str:
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.3g} MB"


def _percent(spread: dict[str, float]) -> str:
    return f"{spread['median']:.1%} ({spread['min']:.1%} to {spread['max']:.1%})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill in the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="result files (jobs/results)")
    parser.add_argument("--root", type=Path, default=ROOT, metavar="DIR", help="folder of the pages (this checkout)")
    args = parser.parse_args(arguments)
    if not args.results.is_dir():
        parser.error(f"--results: expected a folder, got {args.results}")
    for name, sections in PAGES.items():
        page = args.root / name
        page.write_text(filled(page.read_text(encoding="utf-8"), sections, args.results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    main_guard(main)
