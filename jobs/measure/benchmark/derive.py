"""Derive figures from several cells of a run: shares of the device's rates and of a layer's time, speed-ups."""

from collections.abc import Iterable, Sequence

from jobs.measure.benchmark.cell import MEASURED, Values

COPY, MATMUL, LAYER, PLAIN = "device copy", "matrix product", "decoder layer", "plain"


def derive(cells: Sequence[Values]) -> list[Values]:
    """Copies of the cells with derived figures, where all inputs were measured.

    ops            per form: share_of_copy of the device's bandwidth, share_of_matmul of its FLOP/s
    stage          share_of_layer of one decoder layer's prefill time at the same size
    prefill decode speedup: the plain model's time divided by this one's, at the same sizes
    """
    copy, matmul = _rate(cells, COPY, "bytes"), _rate(cells, MATMUL, "flops")
    out = []
    for cell in cells:
        cell = dict(cell)
        if "forms" in cell:
            rates = {"share_of_copy": (cell["bytes"], copy), "share_of_matmul": (cell["flops"], matmul)}
            cell["forms"] = {name: form | _shares(form, rates) for name, form in cell["forms"].items()}
        if cell["suite"] == "stage" and cell["name"] != LAYER:
            cell |= _ratio("share_of_layer", cell, find(cells, "stage", LAYER, cell["at"]))
        if cell["suite"] in ("prefill", "decode") and cell["name"] != PLAIN:
            cell |= _ratio("speedup", find(cells, cell["suite"], PLAIN, cell["at"]), cell)
        out.append(cell)
    return out


def find(cells: Iterable[Values], suite: str, name: str, at: Values) -> Values | None:
    return next((c for c in cells if (c["suite"], c["name"], c["at"]) == (suite, name, at)), None)


def median(cell: Values | None) -> float | None:
    """Median seconds of a cell or form; None if it was not measured."""
    return cell["seconds"]["median_s"] if cell and cell["status"] == MEASURED and "seconds" in cell else None


def _ratio(name: str, above: Values | None, below: Values | None) -> Values:
    top, bottom = median(above), median(below)
    return {} if top is None or not bottom else {name: top / bottom}


def _rate(cells: Sequence[Values], name: str, what: str) -> float | None:
    cell = next((cell for cell in cells if cell["name"] == name), None)
    seconds = median(cell)
    return cell[what] / seconds if cell and seconds else None


def _shares(form: Values, rates: dict[str, tuple[int, float | None]]) -> Values:
    seconds = median(form)
    return {name: amount / seconds / rate for name, (amount, rate) in rates.items() if seconds and rate and amount}
