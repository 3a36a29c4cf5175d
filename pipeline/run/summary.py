"""Summarises a run from its rows: as a JSON object, and as a table for the terminal.

Times and speed cover the rows of this start only, per actor. An actor's time runs from its first unit's start to its
last row's end, by its own clock; loading the model is not included. It consists of waiting for a CPU to decode on
(queue), waiting for frames (wait), work (encode, prefill, generate), and the rest (other: transfer of units and rows,
tokenising, units that failed in the model, restarts).

    speed of light = work ÷ actors' time: the rate of finished units divided by the rate of the same models at the same
    speed if they never waited. Decoders that slow down the models (shared cores or memory bandwidth) lower both rates;
    `jobs/measure/pipeline.py` measures that as well.
"""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

WORK = ("encode", "prefill", "generate")
STATUSES = ("ok", "truncated", "skipped", "error")
UNIT_COLUMNS = ["id", "start_s", "end_s", "duration_s"]  # of the manifest; for rows see `columns()`
_COLUMNS = [
    "id",
    "status",
    "error_stage",
    "error_type",
    "error_message",
    "vision_tokens",
    "kept_tokens",
    "retention",
    "kv_bytes",
    "kv_bytes_uncompressed",
    "decode_s",
    "wait_s",
    "queue_s",
    "encode_s",
    "prefill_s",
    "generate_s",
    "started_at",
    "finished_at",
    "actor",
]


def columns() -> dict[str, pc.Expression]:
    """The columns of rows that a summary needs, with the number of frames instead of their times."""
    return {name: pc.field(name) for name in _COLUMNS} | {"frames": pc.list_value_length(pc.field("frame_times_s"))}


def summarise(
    units: pa.Table, rows: pa.Table, *, run_id: str, wall_s: float, this_start: pa.ChunkedArray
) -> dict[str, Any]:
    """The summary of a run as a JSON-serialisable dictionary.

    units       the manifest's
    rows        all rows so far
    wall_s      wall time of this start
    this_start  ids of the units that were open at this start
    """
    counts = {status: pc.sum(pc.equal(rows["status"], status)).as_py() or 0 for status in STATUSES}
    answered = rows.filter(pc.is_in(rows["status"], value_set=pa.array(["ok", "truncated"])))
    seconds = {
        name: round(_total(rows, f"{name}_s"), 3) for name in ("decode", "wait", "encode", "prefill", "generate")
    }
    fresh = rows.filter(pc.is_in(rows["id"], value_set=this_start.combine_chunks()))
    speed = _speed(fresh)
    saved = _total(answered, "kv_bytes_uncompressed") - _total(answered, "kv_bytes")
    return {
        "run_id": run_id,
        "units": {"planned": units.num_rows, "finished": rows.num_rows, **counts},
        "errors": _errors(rows),
        "video_hours": round(_hours(units, answered), 4),
        "frames": int(_total(answered, "frames")),
        "vision_tokens": int(_total(answered, "vision_tokens")),
        "kept_tokens": int(_total(answered, "kept_tokens")),
        "retention": round(pc.mean(answered["retention"]).as_py() or 1.0, 4),
        "kv_bytes": int(_total(answered, "kv_bytes")),
        "kv_bytes_saved": int(saved),
        "seconds": seconds,
        "bottleneck": _bottleneck(speed["seconds"]),
        "this_start": {
            "units": fresh.num_rows,
            "done_before": rows.num_rows - fresh.num_rows,
            "wall_s": round(wall_s, 2),
            "units_per_hour": round(3600 * fresh.num_rows / wall_s, 1) if wall_s > 0 else None,
            **speed,
        },
    }


def table(summary: dict[str, Any]) -> str:
    """The summary as text for the terminal."""
    units, start, seconds = summary["units"], summary["this_start"], summary["seconds"]
    lines = [
        ("run", summary["run_id"]),
        (
            "units",
            f"{units['finished']:,} of {units['planned']:,} finished ({start['done_before']:,} before this start)",
        ),
        ("", "  ".join(f"{status} {units[status]:,}" for status in STATUSES)),
        *[("", f"  {e['count']:,} × {e['stage']}/{e['type']}: {e['example'][:100]}") for e in summary["errors"]],
        ("video", f"{clock(summary['video_hours'] * 3600)} (h:m:s), {summary['frames']:,} frames"),
        (
            "vision tokens",
            f"{summary['vision_tokens']:,} → {summary['kept_tokens']:,} in the last layers, "
            f"{summary['retention']:.1%} of the vision KV cache on average over layers",
        ),
        ("KV cache", f"{format_bytes(summary['kv_bytes'])}, {format_bytes(summary['kv_bytes_saved'])} saved"),
        ("seconds", "  ".join(f"{name} {value:,.1f}" for name, value in seconds.items())),
        ("bottleneck", summary["bottleneck"]),
        (
            "speed",
            f"{start['units']:,} units in {start['wall_s']:,.0f} s: {start['units_per_hour'] or 0:,.0f} per hour",
        ),
        *_light(start),
    ]
    return "\n".join(f"{name:<14} {text}" for name, text in lines)


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def format_bytes(count: float) -> str:
    """Bytes in binary units, with four significant digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.4g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    return f"{count:.4g} TiB"


def _errors(rows: pa.Table) -> list[dict[str, Any]]:
    failed = rows.filter(pc.is_valid(rows["error_type"]))
    keys = ["error_stage", "error_type"]
    groups = failed.group_by(keys).aggregate([("id", "count"), ("error_message", "min")]).to_pylist()
    groups.sort(key=lambda group: (-group["id_count"], group["error_stage"], group["error_type"]))
    return [
        {
            "stage": group["error_stage"],
            "type": group["error_type"],
            "count": group["id_count"],
            "example": " ".join((group["error_message_min"] or "").split()),
        }
        for group in groups
    ]


def _hours(units: pa.Table, answered: pa.Table) -> float:
    seen = units.filter(pc.is_in(units["id"], value_set=answered["id"].combine_chunks()))
    begin = pc.fill_null(seen["start_s"], 0.0)
    end = pc.coalesce(seen["end_s"], seen["duration_s"], begin)
    return (pc.sum(pc.subtract(end, begin)).as_py() or 0.0) / 3600


def _speed(rows: pa.Table) -> dict[str, Any]:
    """The actors' seconds per activity, their rate, and the rate of models that never wait."""
    timed = rows.filter(pc.and_(pc.is_valid(rows["started_at"]), pc.is_valid(rows["finished_at"])))
    spans = timed.group_by("actor").aggregate([("started_at", "min"), ("finished_at", "max")]).to_pylist()
    actors_s = sum((span["finished_at_max"] - span["started_at_min"]).total_seconds() for span in spans)
    queue_s = _total(timed, "queue_s")
    seconds = {"queue": queue_s, "wait": max(_total(timed, "wait_s") - queue_s, 0.0)}
    seconds |= {name: _total(timed, f"{name}_s") for name in WORK}
    seconds["other"] = max(actors_s - sum(seconds.values()), 0.0)
    work_s, possible = sum(seconds[name] for name in WORK), actors_s > 0
    steady = 3600 * timed.num_rows * len(spans) / actors_s if possible else None
    return {
        "actors": len(spans),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "steady_units_per_hour": round(steady, 1) if steady else None,
        "models_alone_units_per_hour": round(steady * actors_s / work_s, 1) if steady and work_s > 0 else None,
        "speed_of_light": round(min(work_s / actors_s, 1.0), 4) if possible else None,
    }


def _light(start: dict[str, Any]) -> list[tuple[str, str]]:
    if start["models_alone_units_per_hour"] is None:
        return []
    return [
        (
            "speed of light",
            f"{start['speed_of_light']:.0%}: {start['steady_units_per_hour']:,.0f} units per hour with the models "
            f"loaded, of {start['models_alone_units_per_hour']:,.0f} if they never waited",
        )
    ]


_ADVICE = {
    "encode": "fewer or smaller frames (frames.fps, frames.max_px), or more actors",
    "prefill": "lower lightkv.retention, fewer frames, or more actors",
    "generate": "lower model.max_new_tokens, or more actors",
    "other": "between units, or in units that failed in the model: raise ray.actors.batch_units, see the errors",
}


def _bottleneck(seconds: dict[str, float]) -> str:
    """The activity with the largest share of the actors' time, a remedy, and the share of waiting for frames."""
    total = sum(seconds.values())
    if total == 0:
        return "nothing ran"
    queue, wait = seconds["queue"] / total, seconds["wait"] / total
    shares = {"wait": queue + wait} | {name: seconds[name] / total for name in _ADVICE}
    name = max(shares, key=lambda key: shares[key])
    told = f"{name} ({shares[name]:.0%} of the actors' time): "
    if name != "wait":
        return f"{told}{_ADVICE[name]}; {queue + wait:.0%} was waiting for frames"
    advice = "add CPUs, or lower decode.num_cpus" if queue > wait else "raise decode.prefetch_units, or add CPUs"
    return f"{told}{queue:.0%} for a free CPU to decode on, {wait:.0%} for the frames themselves; {advice}"


def _total(rows: pa.Table, column: str) -> float:
    return float(pc.sum(rows[column]).as_py() or 0)
