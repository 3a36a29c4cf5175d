"""The summary: every figure follows from the rows."""

from pipeline.summary import columns, format_bytes, summarise, table
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


def _summary(**changes):
    table_of_rows = rows(
        row("a", **(_ANSWERED | changes)),
        row("b", "truncated", **_ANSWERED),
        row("c", "error"),
        row("d", "error", error_type="Other", error_stage="fetch"),
        row("e", "error"),
        row("f", "skipped"),
    )
    manifest = units("a", "b", "c", "d", "e", "f", "g", duration_s=1800.0)
    return summarise(manifest, table_of_rows.select(columns()), run_id="r", wall_s=36.0, done_before=2)


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
    summary = summarise(manifest, rows(row("a", **_ANSWERED)), run_id="r", wall_s=1.0, done_before=0)
    assert summary["video_hours"] == 0.01


def test_speed_is_of_this_start():
    assert _summary()["this_start"] == {"units": 4, "done_before": 2, "wall_s": 36.0, "units_per_hour": 400.0}


def test_bottleneck_is_where_the_actors_time_went():
    assert _summary()["bottleneck"].startswith("prefill (50%")
    assert _summary(wait_s=50.0)["bottleneck"].startswith("wait (82%")


def test_run_without_rows_has_a_summary():
    summary = summarise(units("a"), rows(), run_id="r", wall_s=0.0, done_before=0)
    assert summary["units"]["finished"] == 0
    assert summary["bottleneck"] == "nothing ran"
    assert "0 of 1 finished" in table(summary)


def test_table_names_errors_and_savings():
    text = table(_summary())
    assert "2 × decode/Broken: bad" in text
    assert "800 B saved" in text


def test_bytes_are_given_in_binary_units():
    assert [format_bytes(b) for b in (0, 1023, 1024, 1536, 3 << 30, 5 << 40)] == [
        "0 B",
        "1023 B",
        "1 KiB",
        "1.5 KiB",
        "3 GiB",
        "5 TiB",
    ]
