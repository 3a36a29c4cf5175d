"""What a run did, from its rows: one JSON object, and a table for people."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

STATUSES = ("ok", "truncated", "skipped", "error")
_COLUMNS = [
    "id",
    "status",
    "error_stage",
    "error_type",
    "error_message",
    "frame_times_s",
    "vision_tokens",
    "kept_tokens",
    "retention",
    "kv_bytes",
    "kv_bytes_uncompressed",
    "decode_s",
    "wait_s",
    "encode_s",
    "prefill_s",
    "generate_s",
]


def columns() -> list[str]:
    """The row columns a summary needs."""
    return list(_COLUMNS)


def summarise(units: pa.Table, rows: pa.Table, *, run_id: str, wall_s: float, done_before: int) -> dict[str, Any]:
    """The summary of a run (JSON-able): `units` of the manifest, `rows` so far, and this start's wall time."""
    counts = {status: pc.sum(pc.equal(rows["status"], status)).as_py() or 0 for status in STATUSES}
    answered = rows.filter(pc.is_in(rows["status"], value_set=pa.array(["ok", "truncated"])))
    seconds = {
        name: round(_total(rows, f"{name}_s"), 3) for name in ("decode", "wait", "encode", "prefill", "generate")
    }
    this_start = rows.num_rows - done_before
    saved = _total(answered, "kv_bytes_uncompressed") - _total(answered, "kv_bytes")
    return {
        "run_id": run_id,
        "units": {"planned": units.num_rows, "finished": rows.num_rows, **counts},
        "errors": _errors(rows),
        "video_hours": round(_hours(units, answered), 4),
        "frames": pc.sum(pc.list_value_length(answered["frame_times_s"])).as_py() or 0,
        "vision_tokens": int(_total(answered, "vision_tokens")),
        "kept_tokens": int(_total(answered, "kept_tokens")),
        "retention": round(pc.mean(answered["retention"]).as_py() or 1.0, 4),
        "kv_bytes": int(_total(answered, "kv_bytes")),
        "kv_bytes_saved": int(saved),
        "seconds": seconds,
        "bottleneck": _bottleneck(seconds),
        "this_start": {
            "units": this_start,
            "done_before": done_before,
            "wall_s": round(wall_s, 2),
            "units_per_hour": round(3600 * this_start / wall_s, 1) if wall_s > 0 else None,
        },
    }


def table(summary: dict[str, Any]) -> str:
    """The summary for a terminal."""
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
    ]
    return "\n".join(f"{name:<14} {text}" for name, text in lines)


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def format_bytes(count: float) -> str:
    """Bytes in binary units, four digits."""
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


def _bottleneck(seconds: dict[str, float]) -> str:
    """Where the model actors' time went; `decode_s` runs beside them and counts only as far as they waited."""
    busy = {name: seconds[name] for name in ("wait", "encode", "prefill", "generate")}
    total = sum(busy.values())
    if total == 0:
        return "nothing ran"
    name = max(busy, key=lambda key: busy[key])
    advice = {
        "wait": "waited for frames: add CPUs, or raise decode.prefetch_units",
        "encode": "fewer or smaller frames (frames.fps, frames.max_px), or more actors",
        "prefill": "lower lightkv.retention, fewer frames, or more actors",
        "generate": "lower model.max_new_tokens, or more actors",
    }
    return f"{name} ({busy[name] / total:.0%} of the actors' time): {advice[name]}"


def _total(rows: pa.Table, column: str) -> float:
    return float(pc.sum(rows[column]).as_py() or 0)
