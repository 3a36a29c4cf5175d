"""The soak chooses its victims, and counts lost, doubled and foreign rows."""

import json
import subprocess
import sys
from collections import Counter

import pytest

from jobs.measure.soak import ASKED, DRIVER, TITLES, VICTIMS, Chance, Tally, judge, report, strike, write_manifest

ANSWERS = {("a.mp4", "what ?", None): "A", ("b.mp4", "what ?", 1.0): "B"}


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
    assert [(line["uri"], line["end_s"]) for line in lines] == [("a.mp4", None), ("b.mp4", 1.0)] * 2
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


def test_every_victim_has_its_turns_and_keeps_one_until_it_is_hit():
    chance = Chance(seed=3)
    turns = Counter()
    for _ in range(2 * sum(VICTIMS.values())):
        assert chance.victim() == chance.victim()
        turns[chance.hit()] += 1
    assert turns == {victim: 2 * count for victim, count in VICTIMS.items()}


def test_report_names_victims_that_were_never_hit():
    assert report(Tally(kills=Counter(model=2)))["kills"] == dict.fromkeys(VICTIMS, 0) | {"model": 2}


_SLEEP = "import time; time.sleep(30)"
_PARENT = """
import subprocess, sys, time
time.sleep(0.2)
sys.exit(subprocess.call([sys.executable, "-c", *sys.argv[1:]]))
"""


def _driver(title=None):
    """A process. With a title, it soon has a child of that title and ends with the child's exit code."""
    code = [_SLEEP] if title is None else [_PARENT, _SLEEP, title]
    return subprocess.Popen([sys.executable, "-c", *code])


@pytest.mark.parametrize("victim", TITLES)
def test_victim_is_waited_for_and_killed_alone(victim):
    driver = _driver(f"{TITLES[victim]}(…)")
    assert strike(driver, victim)
    assert driver.wait(20) == 256 - 9, "the driver lived on and saw its child's end"


@pytest.mark.parametrize(("victim", "signal"), [(DRIVER, 9), (ASKED, 15)])
def test_driver_is_killed_or_asked(victim, signal):
    driver = _driver()
    assert strike(driver, victim)
    assert driver.wait(20) == -signal


def test_victim_that_does_not_come_up_is_not_hit():
    driver = _driver()
    assert not strike(driver, "decoder", wait_s=0.3)
    driver.kill()
    driver.wait()
    assert not strike(driver, "decoder")
