"""Writes the accuracy tables of the model card, from a result of `measure`, between the card's two markers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pipeline.mini.accuracy import standard_error

BEGIN, END = "<!-- accuracy -->", "<!-- /accuracy -->"
GROUPS = {"image": "Images", "video": "Videos", "set": "Sets of images"}
STRONG, WEAK = 0.8, 0.6


def with_accuracy(card: str, result: dict[str, Any]) -> str:
    """The card's text with the result between its markers. Raises ValueError unless it has exactly one pair."""
    if (card.count(BEGIN), card.count(END)) != (1, 1) or card.index(BEGIN) > card.index(END):
        raise ValueError(f"expected one {BEGIN} and after it one {END} in the card; add them where the tables belong")
    return card[: card.index(BEGIN)] + BEGIN + "\n" + accuracy(result) + "\n" + card[card.index(END) :]


def without_accuracy(card: str) -> str:
    """The card's text except what `with_accuracy` wrote."""
    return re.sub(f"{BEGIN}.*?{END}", "", card, flags=re.DOTALL)


def write_accuracy(card: Path, result: dict[str, Any]) -> None:
    """Put the result into the card file."""
    card.write_text(with_accuracy(card.read_text(encoding="utf-8"), result), encoding="utf-8")


def accuracy(result: dict[str, Any]) -> str:
    """Markdown: what was measured, a table per kind of input, and which tasks are good enough to measure losses on."""
    versions, split = result["versions"], result["split"]
    known = [entry for entry in result["inputs"] if entry["split"] == split]
    held_out = [entry for entry in result["inputs"] if entry["split"] == "held_out"]
    parts = [
        f"{result['parameters']:,} parameters, measured in {result['dtype']} with torch {versions['torch']} and "
        f"transformers {versions['transformers']}; weights sha256 `{result['weights_sha256'][:16]}…`. Scenes count "
        f"from seed 0 of the split “{split}”, their number in brackets; ± is the standard error.",
        _ranking(known),
    ]
    for kind, title in GROUPS.items():
        columns = [(f"{_title(entry)} ({entry['scenes']})", entry) for entry in known if entry["kind"] == kind]
        parts.append(_table(title, columns))
    coded = [(_coded_title(entry), entry) for entry in result["coded"]]
    parts.append(_table("H.264 files, decoded, sampled at two frames a second and answered by `generate`", coded))
    parts.append(
        _table("Combinations never trained, beside scenes of the same kind without them", _beside(known, held_out))
    )
    return "\n\n".join(part for part in parts if part)


def _ranking(entries: Sequence[dict[str, Any]]) -> str:
    """Tasks by their share over all inputs of the split."""
    shares = {task: _share(entries, task) for task in _tasks(entries)}
    strong = [f"{task} ({share:.2f})" for task, share in shares.items() if share >= STRONG]
    weak = [f"{task} ({share:.2f})" for task, share in shares.items() if share < WEAK]
    return (
        f"Over all images, videos and sets below, strong (right in at least {STRONG:.2f}): "
        f"{', '.join(strong) or 'none'}. "
        f"Weak (right in less than {WEAK:.2f}, and yes or no by chance in half): {', '.join(weak) or 'none'}."
    )


def _share(entries: Sequence[dict[str, Any]], task: str) -> float:
    found = [entry["tasks"][task] for entry in entries if task in entry["tasks"]]
    return sum(cell["right"] for cell in found) / sum(cell["asked"] for cell in found)


def _beside(known: Sequence[dict], held_out: Sequence[dict]) -> list[tuple[str, dict]]:
    columns = []
    for entry in held_out:
        kind = GROUPS[entry["kind"]].lower()
        columns += [(f"{kind} {_title(other)}", other) for other in known if _title(other) == _title(entry)]
        columns.append((f"{kind} {_title(entry)}, with one never trained", entry))
    return columns


def _table(title: str, columns: Sequence[tuple[str, dict[str, Any]]]) -> str:
    if not columns:
        return ""
    rows = [f"**{title}**\n", f"| task | {' | '.join(name for name, _ in columns)} |", f"|---|{'---|' * len(columns)}"]
    for task in _tasks(entry for _, entry in columns):
        rows.append(f"| {task} | {' | '.join(_cell(entry['tasks'].get(task)) for _, entry in columns)} |")
    return "\n".join(rows)


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "–"
    right, asked = cell["right"], cell["asked"]
    return f"{right / asked:.2f} ± {standard_error(right, asked):.2f}"


def _tasks(entries: Iterable[dict[str, Any]]) -> list[str]:
    """Captions first, then by name."""
    return sorted(
        {task for entry in entries for task in entry["tasks"]}, key=lambda task: ("caption" not in task, task)
    )


def _title(entry: dict[str, Any]) -> str:
    count = {"video": f", {entry['frames']} frames", "set": f", {entry['frames']} images", "image": ""}[entry["kind"]]
    each = " each" if entry["kind"] == "set" else ""
    size = f"{entry['height_px']}×{entry['width_px']}"
    return f"{size}{count}, ≤ {entry['max_things']} things{each}"


def _coded_title(entry: dict[str, Any]) -> str:
    signs = ", signs" if entry["sign_share"] else ""
    return f"{entry['videos']} of {entry['height_px']}×{entry['width_px']}, ≤ {entry['max_things']} things{signs}"
