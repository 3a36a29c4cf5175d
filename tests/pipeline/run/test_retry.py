"""Tests of retries: which units are repeated, and how their rows replace the old ones."""

import pyarrow.parquet as pq

from pipeline.config import load_config
from pipeline.run.directory import RunDirectory
from pipeline.run.retry import merge_rows, open_retry
from tests.pipeline.rows import row, rows, units


def _run(folder):
    run = RunDirectory(load_config(None, ["source.uri=/videos", f"sink.uri={folder}"]))
    work = run.open()
    work.write_manifest(units("a", "b", "c", "d"))
    (folder / "data").mkdir()
    pq.write_table(rows(row("a"), row("b", "error", attempts=2)), folder / "data" / "one.parquet")
    pq.write_table(rows(row("c", "error"), row("d", "skipped")), folder / "data" / "two.parquet")
    return run, work


def _repeat(folder, number, *new_rows):
    data = folder / "_run" / f"retry-{number}" / "data"
    data.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows(*new_rows), data / "again.parquet")


def test_error_rows_alone_are_repeated_and_keep_their_count_of_attempts(tmp_path):
    run, work = _run(tmp_path)
    number, again = open_retry(run, work)
    assert number == 1
    assert again.prepare() == (2, 0)
    opened = pq.read_table(tmp_path / "_run" / "retry-1" / "open.parquet")
    assert opened.select(["id", "attempts"]).to_pydict() == {"id": ["b", "c"], "attempts": [2, 1]}


def test_new_rows_replace_the_old_and_every_unit_keeps_one_row(tmp_path):
    run, work = _run(tmp_path)
    open_retry(run, work)
    _repeat(tmp_path, 1, row("b", text="now fine", attempts=3), row("c", "error", attempts=2))
    assert merge_rows(run, work, 1) == 2
    result = work.rows(["id", "status", "text", "attempts"]).sort_by("id").to_pylist()
    assert [(r["id"], r["status"], r["text"], r["attempts"]) for r in result] == [
        ("a", "ok", None, 1),
        ("b", "ok", "now fine", 3),
        ("c", "error", None, 2),
        ("d", "skipped", None, 1),
    ]


def test_merging_twice_changes_nothing(tmp_path):
    run, work = _run(tmp_path)
    open_retry(run, work)
    _repeat(tmp_path, 1, row("b"), row("c"))
    merge_rows(run, work, 1)
    first = work.rows().sort_by("id")
    merge_rows(run, work, 1)
    assert work.rows().sort_by("id").equals(first)


def test_unfinished_repetition_is_taken_up_before_a_new_one_begins(tmp_path):
    run, work = _run(tmp_path)
    assert open_retry(run, work)[0] == 1
    assert open_retry(run, work)[0] == 1
    _repeat(tmp_path, 1, row("b"), row("c", "error"))
    merge_rows(run, work, 1)
    number, again = open_retry(run, work)
    assert number == 2
    assert again.prepare() == (1, 0)
