"""Tests of the summary: every figure follows from the rows."""

from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pyarrow.dataset as ds

from pipeline.run.summary import columns, format_bytes, summarise, table
from tests.pipeline.rows import row, rows, units

_ANSWERED = {
    "frame_times_s": [0.0, 1.0],
    "vision_tokens": 100,
    "kept_tokens": 20,
    "retention": 0.5,
    "kv_bytes": 600,
    "kv_bytes_uncompressed": 1000,
    "decode_s": 2.0,
    "wait_s": 0.5,
    "encode_s": 1.0,
    "prefill_s": 3.0,
    "generate_s": 1.5,
}
_NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


def _at(begin_s, end_s, actor="x"):
    times = {"started_at": _NOON + timedelta(seconds=begin_s), "finished_at": _NOON + timedelta(seconds=end_s)}
    return times | {"actor": actor}


def _seen(table_of_rows):
    """The columns that a summary reads from data files."""
    return ds.dataset(table_of_rows).to_table(columns())


def _summary(this_start="acef", **changes):
    """Units a–f have rows, g is open. a and b take six seconds each, the others no time."""
    table_of_rows = rows(
        row("a", **(_ANSWERED | _at(0, 6) | changes)),
        row("b", "truncated", **_ANSWERED, **_at(-5000, -4994, "old")),
        row("c", "error", **_at(6, 6)),
        row("d", "error", error_type="Other", error_stage="fetch", **_at(-4994, -4994, "old")),
        row("e", "error", **_at(6, 6)),
        row("f", "skipped", **_at(6, 6)),
    )
    manifest = units("a", "b", "c", "d", "e", "f", "g", duration_s=1800.0)
    ids = pa.chunked_array([list(this_start)], pa.string())
    return summarise(manifest, _seen(table_of_rows), run_id="r", wall_s=36.0, this_start=ids)


def _of(*values, wall_s=1.0):
    """The `this_start` part of the summary of a run with these rows."""
    table_of_rows = rows(*values)
    ids = table_of_rows["id"]
    return summarise(units("a"), _seen(table_of_rows), run_id="r", wall_s=wall_s, this_start=ids)["this_start"]


def test_units_are_counted_by_status():
    assert _summary()["units"] == {"planned": 7, "finished": 6, "ok": 1, "truncated": 1, "skipped": 1, "error": 3}


def test_errors_are_grouped_most_frequent_first():
    assert [(e["stage"], e["type"], e["count"]) for e in _summary()["errors"]] == [
        ("decode", "Broken", 2),
        ("fetch", "Other", 1),
    ]


def test_sums_cover_answered_units():
    summary = _summary()
    assert summary["video_hours"] == 1.0
    assert (summary["frames"], summary["vision_tokens"], summary["kept_tokens"]) == (4, 200, 40)
    assert summary["kv_bytes_saved"] == 800
    assert summary["retention"] == 0.5


def test_clips_count_their_own_length():
    manifest = units("a", duration_s=1800.0, start_s=60.0, end_s=96.0)
    answered = rows(row("a", **_ANSWERED))
    summary = summarise(manifest, _seen(answered), run_id="r", wall_s=1.0, this_start=answered["id"])
    assert summary["video_hours"] == 0.01


def test_speed_is_of_this_start():
    start = _summary()["this_start"]
    assert {k: start[k] for k in ("units", "done_before", "wall_s", "units_per_hour")} == {
        "units": 4,
        "done_before": 2,
        "wall_s": 36.0,
        "units_per_hour": 400.0,
    }


def test_units_of_this_start_that_have_no_row_yet_are_not_counted():
    assert _summary("cg")["this_start"]["units"] == 1


def test_sums_of_seconds_are_of_the_whole_run():
    assert _summary()["seconds"] == {"decode": 4.0, "wait": 1.0, "encode": 2.0, "prefill": 6.0, "generate": 3.0}


def test_bottleneck_is_where_the_actors_time_went():
    assert _summary()["bottleneck"].startswith("prefill (50% of the actors' time): ")
    assert _summary()["bottleneck"].endswith("; 8% was waiting for frames")
    assert _summary(wait_s=25.0, **_at(0, 30.5))["bottleneck"].startswith("wait (82%")


def test_rows_of_earlier_starts_do_not_spoil_the_bottleneck():
    assert _summary("f", **_at(0, 6))["bottleneck"] == "nothing ran"


def test_waiting_for_a_cpu_is_told_from_waiting_for_frames():
    summary = _summary(wait_s=25.0, queue_s=20.0, **_at(0, 30.5))
    assert summary["this_start"]["seconds"] == {
        "queue": 20.0,
        "wait": 5.0,
        "encode": 1.0,
        "prefill": 3.0,
        "generate": 1.5,
        "other": 0.0,
    }
    expected = (
        "wait (82% of the actors' time): 66% for a free CPU to decode on, 16% for the frames themselves; add CPUs"
    )
    assert summary["bottleneck"].startswith(expected)


def test_waiting_counts_as_one_when_the_bottleneck_is_sought():
    bottleneck = _summary(wait_s=5.0, queue_s=2.4, **_at(0, 10.5))["bottleneck"]
    assert bottleneck.startswith("wait (48% of the actors' time): 23% for a free CPU")
    assert bottleneck.endswith("raise decode.prefetch_units, or add CPUs")


def test_time_between_units_is_part_of_an_actors_time():
    start = _of(row("a", **_ANSWERED, **_at(0, 6)), row("b", **_ANSWERED, **_at(10, 16)))
    assert start["seconds"]["other"] == 4.0


def test_speed_of_light_is_the_share_of_the_actors_time_in_which_models_worked():
    start = _of(row("a", **_ANSWERED, **_at(0, 10)))
    assert start["speed_of_light"] == 0.55
    assert start["steady_units_per_hour"] == 360.0
    assert start["models_alone_units_per_hour"] == 654.5


def test_actors_add_up_each_by_its_own_clock():
    start = _of(row("a", **_ANSWERED, **_at(0, 10)), row("b", **_ANSWERED, **_at(1_000_000, 1_000_010, "y")))
    assert (start["actors"], start["speed_of_light"], start["steady_units_per_hour"]) == (2, 0.55, 720.0)


def test_rows_without_times_give_no_speed_of_light():
    start = _of(row("a", **_ANSWERED))
    assert (start["actors"], start["speed_of_light"], start["models_alone_units_per_hour"]) == (0, None, None)


def test_run_without_rows_has_a_summary():
    none = pa.chunked_array([[]], pa.string())
    summary = summarise(units("a"), _seen(rows()), run_id="r", wall_s=0.0, this_start=none)
    assert summary["units"]["finished"] == 0
    assert summary["bottleneck"] == "nothing ran"
    assert "0 of 1 finished" in table(summary)
    assert "speed of light" not in table(summary)


def test_table_names_errors_and_savings():
    text = table(_summary())
    assert "2 × decode/Broken: bad" in text
    assert "800 B saved" in text


def test_table_tells_the_speed_of_light():
    expected = "92%: 2,400 units per hour with the models loaded, of 2,618 if they never waited"
    assert expected in table(_summary())


def test_bytes_are_given_in_binary_units():
    assert [format_bytes(b) for b in (0, 1023, 1024, 1536, 3 << 30, 5 << 40)] == [
        "0 B",
        "1023 B",
        "1 KiB",
        "1.5 KiB",
        "3 GiB",
        "5 TiB",
    ]
