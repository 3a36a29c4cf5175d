"""Plans a run: turns every video and image set of the source into units, probed and cut into clips."""

import itertools
import math
import sys
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pipeline.config import Clips, JobConfig
from pipeline.errors import ConfigError, SourceError
from pipeline.planning.known import Known
from pipeline.planning.probe import Probe, probe_all
from pipeline.planning.sources import Item, find
from pipeline.schema import UNIT_SCHEMA, unit_id, units_table

_BATCH_ITEMS = 4096
_KNOWN_ITEMS = 256
_SHOWN_ERRORS = 5
_ROUND_DIGITS = 6  # decimal places of clip bounds in seconds


def plan_units(config: JobConfig) -> pa.Table:
    """All units of `config.source` as a table of UNIT_SCHEMA; the same source gives the same ids in the same order.

    Repeated rows of a manifest are planned once; units with a row under `source.known` are not planned. The schema's
    metadata counts what is left out: `ignored_files`, `repeated_rows`, `known_units`. Raises `SourceError`, or
    `ConfigError` if clips need a probe.
    """
    if config.clips.length_s is not None and not config.source.probe:
        raise ConfigError("clips.length_s needs the length of every video; set source.probe to true")
    found, wanted = find(config), config.source.max_units or sys.maxsize
    known = Known(config, config.source.known) if config.source.known else None
    tables, ids = [UNIT_SCHEMA.empty_table()], _Ids()
    planned = left_out = 0
    while planned < wanted and (batch := list(itertools.islice(found.items, _items_at_once(wanted - planned, known)))):
        probes = _probes(batch, config, known)
        table = units_table([u for item in batch for u in _units(item, probes, config) if ids.take(u)])
        tables.append(known.open(table) if known else table)
        planned += len(tables[-1])
        left_out += len(table) - len(tables[-1])
    ids.check(config.source.uri)
    counts = {"ignored_files": found.ignored, "repeated_rows": ids.repeated, "known_units": left_out}
    table = pa.concat_tables(tables).combine_chunks().slice(0, wanted)
    return table.replace_schema_metadata({name: str(count) for name, count in counts.items()})


def cut(start_s: float | None, end_s: float | None, duration_s: float | None, clips: Clips) -> list[tuple[Any, Any]]:
    """`(start_s, end_s)` of the clips of one window; None is an open end. A window without a known end is one clip."""
    end = end_s if duration_s is None else min(end_s or math.inf, duration_s)
    start = start_s or 0.0
    if clips.length_s is None or end is None or end - start <= clips.length_s:
        return [(start_s, end_s)]
    stride = clips.stride_s or clips.length_s
    bounds: list[tuple[Any, Any]] = []
    for number in itertools.count():
        low = round(start + number * stride, _ROUND_DIGITS)
        high = round(low + clips.length_s, _ROUND_DIGITS)
        if low >= end:
            break
        bounds.append((low, high))
        if high >= end:
            break
    if bounds[-1][1] >= end:
        low, _ = bounds.pop()
        if bounds and end - low < clips.min_length_s:
            low, _ = bounds.pop()
        bounds.append((low, end_s))  # the window's own end, open if it is open: a header's length is not exact
    return bounds


def _items_at_once(wanted: int, known: Known | None) -> int:
    """How many items to probe next for `wanted` units: each gives at least one, unless it is known."""
    return min(_BATCH_ITEMS, max(wanted, _KNOWN_ITEMS if known else 1))


def _probes(items: list[Item], config: JobConfig, known: Known | None) -> dict[str, Probe]:
    if not config.source.probe:
        return {}
    before = known.probes(items) if known else {}
    uris = [uri for item in items for uri in item.uris if uri not in before]
    return before | probe_all(uris, config.storage, workers=config.source.probe_workers)


def _units(item: Item, probes: dict[str, Probe], config: JobConfig) -> Iterator[dict[str, Any]]:
    seen = [probes.get(uri, Probe(uri)) for uri in item.uris]
    first, sizes = seen[0], [one.size_bytes for one in seen]
    prompts = _prompts(item, config)
    known: dict[str, Any] = {
        "kind": item.kind,
        "uris": list(item.uris),
        "etag": first.etag or (item.entry.etag if item.entry else None),
        "size_bytes": sum(filter(None, sizes)) if None not in sizes else item.entry.size_bytes if item.entry else None,
        "prompts": prompts,
        "attempts": 0,
        "duration_s": first.duration_s,
        "width": first.width,
        "height": first.height,
        "fps": first.fps,
        "codec": first.codec,
        "probe_error": next((one.error for one in seen if one.error), None),
    }
    clips = cut(item.start_s, item.end_s, first.duration_s, config.clips) if item.kind == "video" else [(None, None)]
    for start, end in clips:
        name = item.id if item.id is None or len(clips) == 1 else f"{item.id}@{start:g}s"
        unit = known | {"start_s": start, "end_s": end, "row": item.row, "named": item.id is not None}
        yield unit | {"id": name or unit_id(item.uris, start, end, prompts)}


def _prompts(item: Item, config: JobConfig) -> list[dict[str, str]]:
    pairs = item.prompts or tuple((prompt.id, prompt.text) for prompt in config.prompts)
    return [{"prompt_id": name, "prompt": text} for name, text in pairs]


class _Ids:
    """The ids planned so far. A repeated id of the manifest is an error, a repeated unit is counted."""

    def __init__(self) -> None:
        self.repeated = 0
        self._rows: dict[str, int | None] = {}
        self._errors: list[str] = []

    def take(self, unit: dict[str, Any]) -> bool:
        """Whether the unit is new. Removes its keys that are not in the schema."""
        row, named = unit.pop("row"), unit.pop("named")
        if unit["id"] not in self._rows:
            self._rows[unit["id"]] = row
            return True
        if named:
            self._errors.append(f"row {row}: id {unit['id']!r} is already used by row {self._rows[unit['id']]}")
        self.repeated += 1
        return False

    def check(self, uri: str) -> None:
        if self._errors:
            more = len(self._errors) - _SHOWN_ERRORS
            shown = self._errors[:_SHOWN_ERRORS] + ([f"and {more} more"] if more > 0 else [])
            raise SourceError(f"source.uri {uri}: " + "\n  ".join(["every id must be unique:", *shown]))
