"""What the soak calls lost, doubled and foreign."""

import json

from jobs.soak import Tally, judge, report, write_manifest

ANSWERS = {("a.mp4", "what ?"): "A", ("b.mp4", "what ?"): "B"}


def _judged(tmp_path, change):
    expected = write_manifest(tmp_path / "units.jsonl", ANSWERS, 4)
    rows = [{"id": id_, "text": text} for id_, text in expected.items()]
    tally = Tally()
    judge(change(rows), expected, tally)
    return tally


def test_rows_of_their_own_are_clean(tmp_path):
    tally = _judged(tmp_path, lambda rows: rows)
    assert tally.clean
    assert tally.units == 4


def test_manifest_asks_about_every_video_with_ids_of_their_own(tmp_path):
    expected = write_manifest(tmp_path / "units.jsonl", ANSWERS, 4)
    lines = [json.loads(line) for line in (tmp_path / "units.jsonl").read_text().splitlines()]
    assert [line["uri"] for line in lines] == ["a.mp4", "b.mp4", "a.mp4", "b.mp4"]
    assert [expected[line["id"]] for line in lines] == ["A", "B", "A", "B"]


def test_missing_row_is_lost(tmp_path):
    tally = _judged(tmp_path, lambda rows: rows[1:])
    assert (tally.clean, tally.lost) == (False, ["unit-00000"])


def test_second_row_is_doubled(tmp_path):
    tally = _judged(tmp_path, lambda rows: [*rows, rows[2]])
    assert (tally.clean, tally.doubled) == (False, ["unit-00002"])


def test_text_of_another_video_and_no_text_are_foreign(tmp_path):
    def change(rows):
        return [rows[0] | {"text": "B"}, rows[1] | {"text": None}, *rows[2:]]

    tally = _judged(tmp_path, change)
    assert (tally.clean, tally.foreign) == (False, ["unit-00000", "unit-00001"])
    assert report(tally)["foreign"] == {"units": 2, "first": ["unit-00000", "unit-00001"]}
