"""Format the engine's result as Markdown: one paragraph or table per part; – means not measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jobs.measure.benchmark.cell import MEASURED, Values
from jobs.measure.benchmark.engine.hours import CARDS, PIECE_BYTES, WEIGHTS_BYTES
from jobs.measure.benchmark.tables import NONE, missing

Spread = dict[str, float]


def report(result: Values) -> str:
    """All parts of one device, after a line with device, versions and command."""
    named = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    cores = f", {result['device']['cores']} cores" if "cores" in result["device"] else ""
    head = (
        f"{result['device']['name']}{cores}, {result['dtype']}, {named}: medians, least to most in brackets. Made by "
        f"`{result['command']}` in {result['spent_s'] / 60:.1f} minutes."
    )
    cells = result["cells"]
    paragraphs = [head, *(part(cells) for part in (memory, throughput, prompts, streamed, missing))]
    return "\n\n".join(text for text in paragraphs if text)


def hours(cells: Iterable[Values]) -> str:
    """The table computed from shapes, the same for every device."""
    rows = [
        [
            cell["name"],
            f"{cell['kv_bytes'] / 1e9:.1f} GB",
            *(_duration(cell["fits_hours"][str(card)]) for card in CARDS),
        ]
        for cell in cells
        if cell["suite"] == "hours" and cell["status"] == MEASURED
    ]
    legend = (
        f"**An hour of video** at 1 fps, 448 × 448 px, in Qwen2.5-VL-7B (28 layers, 4 KV heads of 128, bf16), from "
        f"shapes alone: its KV cache, and the longest video that fits beside {WEIGHTS_BYTES / 1e9:.1f} GB of weights, "
        f"{PIECE_BYTES / 1e9:.0f} GB for one piece in prefill, the cache's spare capacity, and two layers that exist "
        "twice while they are unpacked or copied. Rows from “+ folded” on add to the row before them."
    )
    return _table(legend, ["", "KV cache", *(f"longest in {card} GB" for card in CARDS)], rows)


def memory(cells: Iterable[Values]) -> str:
    found = [cell for cell in cells if cell["suite"] == "memory"]
    if not found:
        return ""
    minutes = sorted({cell["at"]["minutes"] for cell in found})
    at = {(cell["name"], cell["at"]["minutes"]): _peak(cell) for cell in found}
    names = dict.fromkeys(cell["name"] for cell in found)
    rows = [[name, *(at[name, length] for length in minutes)] for name in names]
    legend = (
        f"**Memory against length**, one video at 1 fps of {found[0]['at']['frame_px']} × {found[0]['at']['frame_px']} "
        f"px ({found[0]['at']['model']}): peak of prefill, cache and answer on top of the loaded model (the cache at "
        "the end of prefill), MiB."
    )
    return _table(legend, ["", *(f"{length} min" for length in minutes)], rows)


def _peak(cell: Values) -> str:
    if cell["status"] != MEASURED:
        return NONE
    return f"{cell['peak_bytes'] / 2**20:.0f} ({cell['kv_bytes'] / 2**20:.1f})"


def throughput(cells: Iterable[Values]) -> str:
    found = [cell for cell in cells if cell["suite"] == "throughput" and cell["status"] == MEASURED]
    if not found:
        return ""
    rows = [
        [
            _videos(cell),
            f"{cell['vision_tokens']:,}",
            name,
            _number(cell["units_per_hour"][name]),
            _spread(cell["times_loop"][name], "×"),
            f"{equal:.0%}",
        ]
        for cell in found
        for name, equal in cell["equal_to_loop"].items()
    ]
    rounds = " and ".join(str(cell["rounds"]) for cell in found)
    legend = (
        f"**Throughput**, a caption of each video, frames in memory, vision tower included, up to "
        f"{found[0]['at']['answers']} answers together ({rounds} rounds in turns, ratios within a round):"
    )
    head = ["videos × frames", "tokens", "", "videos per hour", "times the loop", "captions equal to the loop's"]
    return _table(legend, head, rows)


def _videos(cell: Values) -> str:
    at = cell["at"]
    return f"{at['units']} × {at['frames']}, {at['frame_px']} px"


def prompts(cells: Iterable[Values]) -> str:
    found = [cell for cell in cells if cell["suite"] == "prompts" and cell["status"] == MEASURED]
    if not found:
        return ""
    counts = list(found[0]["times_one"])
    rows = [
        [f"{cell['name']}{more}", *(_spread(cell[key][count], "×") for count in counts)]
        for cell in found
        for more, key in (("", "times_one"), (", vision tower included", "times_one_with_tower"))
    ]
    at = found[0]["at"]
    legend = (
        f"**Several prompts on one video** of {at['frames']} frames of {at['frame_px']} × {at['frame_px']} px "
        f"({found[0]['vision_tokens']:,} tokens), in the time of one ({found[0]['rounds']} rounds):"
    )
    return _table(legend, ["prompts", *counts], rows)


def streamed(cells: Iterable[Values]) -> str:
    found = [cell for cell in cells if cell["suite"] == "streamed" and cell["status"] == MEASURED]
    if not found:
        return ""
    first = found[0]
    shares = " and ".join(f"{cell['equal']:,} of {cell['answers']:,} ({cell['name']})" for cell in found)
    return (
        f"**Streamed as in one piece**: {first['at']['videos']} videos of {first['vision_tokens']:,} tokens that came "
        f"in {first['pieces']} pieces instead of one, all their questions: {shares} answers are word for word the same."
    )


def _spread(of: Spread, sign: str) -> str:
    if of["min"] == of["max"]:
        return f"{sign}{of['median']:.2f}"
    return f"{sign}{of['median']:.2f} ({of['min']:.2f}–{of['max']:.2f})"


def _number(of: Spread) -> str:
    return f"{of['median']:,.0f} ({of['min']:,.0f}–{of['max']:,.0f})"


def _duration(hours: float) -> str:
    minutes = round(60 * hours)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _table(legend: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join([legend, "", *lines])
