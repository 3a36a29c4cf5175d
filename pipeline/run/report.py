"""Writes the report page: one HTML file from a run's rows and samples, which works offline.

Strings from videos, prompts, models and configurations never become markup. The template escapes them, the data is JSON
without `<`, `>` and `&`, and the script sets text only. A content security policy allows only the page's own script
and style, by their hashes.
"""

import base64
import datetime
import hashlib
import json
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from pipeline.config import Storage
from pipeline.errors import RunError
from pipeline.logs import redacted
from pipeline.run.directory import RunDirectory, Work, read_table
from pipeline.run.samples import read_samples
from pipeline.run.summary import STATUSES, UNIT_COLUMNS, clock, columns, format_bytes, summarise
from pipeline.storage import files as storage

MAX_ROWS = 20_000  # of a larger run: rows with frames first, then errors, then a random choice
MAX_SAMPLE_BYTES = 96 << 20
_TEMPLATES = Path(__file__).with_name("page")
_SCRIPTS = ("data", "list", "survivors", "unit", "page")  # joined into one script, in this order
# The columns of the page's data, in this order.
_PLAIN = (
    "id uri etag size_bytes start_s end_s status error_stage error_type error_message attempts vision_tokens "
    "kept_tokens retention kv_bytes kv_bytes_uncompressed decode_s queue_s wait_s encode_s prefill_s generate_s "
    "peak_memory_bytes"
).split()
_COMPUTED = "uris frames answers version".split()
_VERSION = "model model_revision lightkv code_version config_hash".split()
_LOG = logging.getLogger(__name__)


def write_report(run: RunDirectory) -> str | None:
    """Write `_run/report.html` and return its URI; None if `report.enabled` is false or writing fails.

    Never raises: the run is complete without its page, and `python -m jobs.report` can write it later.
    """
    if not run.job.report.enabled:
        return None
    try:
        run.write("report.html", build_report(run.uri, run.job.storage))
    except Exception as error:
        _LOG.warning("cannot write %s/report.html: %s: %s", run.meta, type(error).__name__, error)
        return None
    return f"{run.meta}/report.html"


def build_report(run_uri: str, config: Storage) -> bytes:
    """The page of the run under `run_uri`, finished or not. Raises `RunError` if there is no run."""
    run_uri = run_uri.rstrip("/")
    meta = f"{run_uri}/_run"
    if not storage.exists(f"{meta}/run.json", config):
        raise RunError(f"{run_uri}: holds no run; expected one that `python -m jobs.caption` wrote")
    found = json.loads(storage.read_bytes(f"{meta}/run.json", config))
    work = Work(config, found["run_id"], meta, f"{run_uri}/data")
    brief = work.rows(["id", "status"])
    samples, samples_left_out = read_samples(run_uri, config, MAX_SAMPLE_BYTES)
    rows = _rows(work, _choice(brief, samples))
    about = _About(
        uri=run_uri,
        run_id=found["run_id"],
        started=found["started"],
        configuration=redacted(storage.read_bytes(f"{meta}/config.yaml", config).decode()),
        samples_left_out=samples_left_out,
    )
    return page(about, _summary(meta, config, work, brief.num_rows), rows, samples).encode()


@dataclass(frozen=True)
class _About:
    """Facts about the run that its summary does not have."""

    uri: str
    run_id: str
    started: str
    configuration: str
    samples_left_out: int


def page(about: _About, summary: dict[str, Any], rows: pa.Table, samples: dict[str, dict[str, Any]]) -> str:
    """The HTML page of `rows`, all or some of a run's, with `samples` by unit id."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"bytes": format_bytes, "clock": clock, "moment": _moment, "redacted": redacted}
    environment.filters |= {"island": _island}
    style = (_TEMPLATES / "page.css").read_text(encoding="utf-8")
    script = "\n".join((_TEMPLATES / f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS)
    shown = rows["id"].to_pylist()
    listed = [id_ for id_ in shown if id_ in samples]
    data = _data(rows) | {"samples": {id_: number for number, id_ in enumerate(listed)}}
    return environment.get_template("page.html.j2").render(
        about=about,
        summary=summary,
        statuses=[(status, summary["units"][status]) for status in STATUSES],
        busy=_shares(summary["this_start"]["seconds"]),
        listed=len(shown),
        data=data,
        samples=[samples[id_] for id_ in listed],
        versions=data["versions"],
        made=datetime.datetime.now(datetime.UTC).isoformat(),
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'",
    )


def _choice(brief: pa.Table, samples: Iterable[str]) -> pa.Array | None:
    """The ids of the rows that the page lists; None: all."""
    if brief.num_rows <= MAX_ROWS:
        return None
    sampled = pc.is_in(brief["id"], value_set=pa.array(list(samples), pa.string()))
    rank = pc.case_when(
        pc.make_struct(sampled, pc.equal(brief["status"], "error")),
        pa.scalar(0),
        pa.scalar(1),
        pa.scalar(2),
    )
    # Ids are hashes, so their order is a random choice.
    order = pa.table({"rank": rank, "id": brief["id"]}).sort_by([("rank", "ascending"), ("id", "ascending")])
    return order["id"].slice(0, MAX_ROWS).combine_chunks()


def _rows(work: Work, ids: pa.Array | None) -> pa.Table:
    names = [*_PLAIN, "uris", "frame_times_s", "answers", *_VERSION]
    return work.rows(names, ids).sort_by([("uri", "ascending"), ("start_s", "ascending"), ("id", "ascending")])


def _summary(meta: str, config: Storage, work: Work, finished: int) -> dict[str, Any]:
    """The run's written summary, or a new one without wall time if rows were added since."""
    if storage.exists(f"{meta}/summary.json", config):
        summary: dict[str, Any] = json.loads(storage.read_bytes(f"{meta}/summary.json", config))
        if summary["units"]["finished"] == finished:
            return summary
    units, rows = read_table(work.manifest, config, UNIT_COLUMNS), work.rows(columns())
    return summarise(units, rows, run_id=work.run_id, wall_s=0.0, this_start=rows["id"])


def _data(rows: pa.Table) -> dict[str, Any]:
    """The rows as the page's script reads them: lists without names; prompts and versions are stored once."""
    prompts: dict[tuple[str, str], int] = {}
    versions: dict[tuple[str | None, ...], int] = {}
    listed = []
    for row in rows.to_pylist():
        version = tuple(row[name] for name in _VERSION)
        times = row["frame_times_s"] or []
        row["error_message"] = row["error_message"] and redacted(row["error_message"])
        answers = [
            [
                prompts.setdefault((answer["prompt_id"], answer["prompt"]), len(prompts)),
                *(answer[name] for name in ("text", "status", "prompt_tokens", "output_tokens")),
            ]
            for answer in row["answers"] or []
        ]
        listed.append(
            [
                *(row[name] for name in _PLAIN),
                row["uris"] if len(row["uris"]) > 1 else None,
                [len(times), times[0], times[-1]] if times else None,
                answers,
                versions.setdefault(version, len(versions)),
            ]
        )
    return {
        "columns": [*_PLAIN, *_COMPUTED],
        "rows": listed,
        "prompts": list(prompts),
        "versions": [dict(zip(_VERSION, version, strict=True)) for version in versions],
    }


def _shares(seconds: dict[str, float]) -> list[tuple[str, float, float, float]]:
    """(name, seconds, percent of the total, percent of all entries before it); empty if nothing ran."""
    total, before, found = sum(seconds.values()), 0.0, []
    for name, value in seconds.items():
        share = 100 * value / total if total else 0.0
        found.append((name, value, share, before))
        before += share
    return found if total else []


def _island(value: Any) -> Markup:
    """`value` as JSON that is safe inside a script element, whatever its strings contain."""
    text = json.dumps(_finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _finite(value: Any) -> Any:
    """`value` with None instead of NaN and infinities, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def _moment(iso: str) -> str:
    return f"{datetime.datetime.fromisoformat(iso).astimezone(datetime.UTC):%Y-%m-%d %H:%M} UTC"


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
