"""Format the benchmark's result as Markdown: one table per suite; – means not measured."""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from jobs.measure.benchmark.cell import Values, parts
from jobs.measure.benchmark.derive import COPY, LAYER, MATMUL, median
from jobs.measure.benchmark.ops.attend import FLEX
from jobs.measure.benchmark.ops.op import KERNEL, TWIN
from jobs.measure.benchmark.ops.suite import ANGLES, COMPACTIONS, DECODE, PACKED, PREFILL
from jobs.measure.benchmark.ops.tokens import GATHERED, MERGE_GATHER

NONE = "–"

Show = Callable[[Values], str]


def report(result: Values) -> str:
    """All tables of one device, after a line with device, versions and command."""
    cells, versions = result["cells"], result["versions"]
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    paragraphs = [
        f"{result['device']['name']}, {result['dtype']}, {named}: medians; {spread(cells)}. "
        f"Made by `{result['command']}` in {result['spent_s'] / 60:.1f} minutes.",
        *(table(cells) for table in (operations, attention, survivors, stages, prefills, decodes)),
        missing(cells),
    ]
    return "\n\n".join(part for part in paragraphs if part)


def operations(cells: Sequence[Values]) -> str:
    """A line per operation, a column per number of tokens."""
    found = [cell for cell in cells if KERNEL in cell.get("forms", {})]
    if not found:
        return ""
    rates = [_rate(cells, COPY, "bytes", "TB/s copied"), _rate(cells, MATMUL, "flops", "TFLOP/s multiplied")]
    legend = (
        f"**Operations**: time · share of a copy's bandwidth, for the minimal bytes moved · the torch twin's time "
        f"divided by it. The device: {', '.join(rates)}."
    )
    return _grid(legend, "operation", found, "tokens", _operation)


def _operation(cell: Values) -> str:
    kernel, twin = (median(cell["forms"][name]) for name in (KERNEL, TWIN))
    if kernel is None:
        return NONE
    share = cell["forms"][KERNEL].get("share_of_copy")
    told = [_time(kernel), NONE if share is None else f"{share:.0%}", _times(twin and twin / kernel)]
    return " · ".join(told)


def attention(cells: Sequence[Values]) -> str:
    """Attention with a bias per key, compared with attention without bias and without our kernel."""
    found = [cell for cell in cells if cell["name"] in (PREFILL, PACKED, DECODE) and "forms" in cell]
    if not found:
        return ""
    legend = (
        "**Attention with a bias per key**: our kernel / torch's scaled_dot_product_attention without bias, the lower "
        "bound / without our kernel (widened heads in prefill, a row in the mask in decode) / torch's flex_attention "
        "with the bias, compiled (one prefill). The second and the third run packed sequences one after another."
    )
    return _grid(legend, "attention", found, "tokens", partial(_beside, (KERNEL, "sdpa", "no kernel", FLEX)))


def _beside(names: Sequence[str], cell: Values) -> str:
    return " / ".join(_time(median(cell["forms"].get(name))) for name in names)


def survivors(cells: Sequence[Values]) -> str:
    """A stage's output, computed by our operation and by alternatives."""
    found = [cell for cell in cells if cell["name"] in (*COMPACTIONS, ANGLES) and "forms" in cell]
    legend = (
        "**Survivors**: merged and gathered in one pass / merged in place on a copy, then gathered; the angles of "
        "their positions computed / gathered from those of all tokens."
    )
    return _grid(legend, "", found, "tokens", _survivors) if found else ""


def _survivors(cell: Values) -> str:
    names = (TWIN, GATHERED) if cell["name"] == ANGLES else (KERNEL, MERGE_GATHER)
    return _beside(names, cell)


def stages(cells: Sequence[Values]) -> str:
    """A line per stage, a column per number of tokens."""
    found = [cell for cell in cells if cell["suite"] == "stage"]
    legend = "**A stage**, and one decoder layer's prefill of as many tokens: time · share of the layer's time."
    return _grid(legend, "", found, "vision tokens", _stage) if found else ""


def _stage(cell: Values) -> str:
    if cell["name"] == LAYER:
        return _time(median(cell))
    share = cell.get("share_of_layer")
    return f"{_time(median(cell))} · {NONE if share is None else f'{share:.0%}'}"


def prefills(cells: Sequence[Values]) -> str:
    """A line per model, batch and number of vision tokens, a column per variant."""
    legend = (
        "**Prefill** of complete decoders with random weights, from embeddings to the first token: time · speed-up "
        "over plain (predicted from FLOPs) · peak memory, weights included."
    )
    return _by_place(legend, cells, "prefill", _prefill)


def _prefill(cell: Values) -> str:
    seconds = median(cell)
    if seconds is None:
        return NONE
    told = [_time(seconds)]
    if "speedup" in cell:
        told.append(f"{_times(cell['speedup'])} ({_times(cell['analytic_speedup'])})")
    if cell["peak_bytes"] is not None:
        told.append(_gib(cell["peak_bytes"]))
    return " · ".join(told)


def decodes(cells: Sequence[Values]) -> str:
    """A line per model and batch, a column per variant."""
    legend = "**Decoding** after that prefill: time per new token of each prompt · speed-up over plain · KV cache."
    return _by_place(legend, cells, "decode", _decode)


def _decode(cell: Values) -> str:
    seconds = median(cell)
    if seconds is None:
        return NONE
    faster = [_times(cell["speedup"])] if "speedup" in cell else []
    return " · ".join([_time(seconds), *faster, _gib(cell["kv_bytes"])])


def missing(cells: Sequence[Values]) -> str:
    """Number of cells and forms that were not measured, by reason; "" if all were."""
    why = Counter(part["why"] for cell in cells for part in parts(cell) if "why" in part)
    if not why:
        return ""
    return f"{NONE} not measured: " + "; ".join(f"{reason} ({count})" for reason, count in why.most_common()) + "."


def spread(cells: Sequence[Values]) -> str:
    """The spread of repeats of the same measurement."""
    apart = [
        (seconds["max_s"] - seconds["min_s"]) / seconds["median_s"]
        for cell in cells
        for part in parts(cell)
        if (seconds := part.get("seconds")) and seconds["median_s"]
    ]
    if not apart:
        return "nothing was timed"
    return (
        f"slowest − fastest repeat is {statistics.median(apart):.0%} of the median, as the median of all measurements, "
        f"{max(apart):.0%} at most"
    )


def _grid(legend: str, corner: str, cells: Sequence[Values], axis: str, shown: Show) -> str:
    sizes = sorted({cell["at"]["tokens"] for cell in cells})
    at = {(cell["name"], cell["at"]["tokens"]): shown(cell) for cell in cells if _has_time(cell)}
    rows = [[name, *(at.get((name, size), NONE) for size in sizes)] for name in dict.fromkeys(c["name"] for c in cells)]
    return _table(
        legend, [corner, *(f"{size:,} {axis}" if not n else f"{size:,}" for n, size in enumerate(sizes))], rows
    )


def _by_place(legend: str, cells: Iterable[Values], suite: str, shown: Show) -> str:
    found = [cell for cell in cells if cell["suite"] == suite]
    if not found:
        return ""
    names = list(dict.fromkeys(cell["name"] for cell in found))
    places: dict[tuple[Any, ...], dict[str, str]] = {}
    for cell in found:
        place = tuple(cell["at"][key] for key in ("model", "batch", "vision_tokens"))
        places.setdefault(place, {})[cell["name"]] = shown(cell)
    rows = [
        [model, str(batch), f"{vision:,}", *(of.get(name, NONE) for name in names)]
        for (model, batch, vision), of in places.items()
        if set(of.values()) != {NONE}
    ]
    return _table(legend, ["model", "batch", "vision tokens", *names], rows)


def _has_time(cell: Values) -> bool:
    return "forms" in cell or median(cell) is not None


def _table(legend: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([legend, "", lines[0], "|---" * len(head) + "|", *lines[1:]])


def _rate(cells: Iterable[Values], name: str, what: str, unit: str) -> str:
    cell = next((cell for cell in cells if cell["name"] == name), None)
    seconds = median(cell)
    return f"{cell[what] / seconds / 1e12:.3g} {unit}" if cell and seconds else f"{NONE} {unit}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    for unit, factor in (("µs", 1e6), ("ms", 1e3)):
        if seconds * factor < 999.5:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def _times(factor: float | None) -> str:
    return NONE if factor is None else f"×{factor:.2g}" if factor < 10 else f"×{factor:.0f}"


def _gib(count: int) -> str:
    return f"{count / 2**30:.3g} GiB"
