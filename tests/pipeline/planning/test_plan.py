"""Tests of plans: units are deterministic, ids unique, clips have no gaps, and no file is lost."""

import itertools
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.config import Clips, load_config
from pipeline.errors import ConfigError, SourceError
from pipeline.planning.plan import cut, plan_units
from pipeline.schema import UNIT_SCHEMA, unit_id
from tests.pipeline.planning.test_sources import manifest
from tests.videos import render


def plan(uri, *overrides):
    return plan_units(load_config(None, [f"source.uri={json.dumps(str(uri))}", "sink.uri=out", *overrides]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two videos of 2 and 5 seconds, and one file that is not a video."""
    path = tmp_path_factory.mktemp("videos")
    render(path / "long.mp4", count=50, fps=10)
    render(path / "short.mkv", count=20, fps=10)
    (path / "text.mp4").write_text("no video")
    (path / "notes.md").write_text("ignored")
    return path


def test_a_folder_becomes_probed_units(folder):
    table = plan(folder)
    assert table.schema.equals(UNIT_SCHEMA)
    long, short, text = table.to_pylist()
    assert [os.path.basename(u["uris"][0]) for u in (long, short, text)] == ["long.mp4", "short.mkv", "text.mp4"]
    assert (long["width"], long["height"], long["codec"], long["probe_error"]) == (144, 96, "h264", None)
    assert long["duration_s"] == pytest.approx(5, abs=0.1)
    assert text["probe_error"].startswith("decode: NotAVideo")
    assert text["size_bytes"] == 8
    assert {u["attempts"] for u in (long, short, text)} == {0}
    assert long["prompts"] == [{"prompt_id": "caption", "prompt": "Describe the video."}]
    assert table.schema.metadata == {b"ignored_files": b"1", b"repeated_rows": b"0", b"known_units": b"0"}


def test_the_same_source_gives_the_same_plan(folder):
    options = ["clips.length_s=1.5", "source.probe_workers=2"]
    assert plan(folder, *options).equals(plan(folder, *options))


def test_ids_follow_from_what_is_asked(folder):
    table = plan(folder, "source.probe=false")
    unit = table.to_pylist()[0]
    assert unit["id"] == unit_id(unit["uris"], None, None, unit["prompts"])
    other = plan(folder, "source.probe=false", 'prompts=[{id: q, text: "Who is there?"}]')
    assert not set(table["id"].to_pylist()) & set(other["id"].to_pylist())


def test_long_videos_are_cut_and_unknown_ones_kept_whole(folder):
    rows = plan(folder, "clips.length_s=2").to_pylist()
    bounds = [(os.path.basename(r["uris"][0]), r["start_s"], r["end_s"]) for r in rows]
    assert bounds == [
        ("long.mp4", 0.0, 2.0),
        ("long.mp4", 2.0, 4.0),
        ("long.mp4", 4.0, None),
        ("short.mkv", None, None),
        ("text.mp4", None, None),
    ]
    assert len({r["id"] for r in rows}) == len(rows)
    assert len(plan(folder, "clips.length_s=2", "source.max_units=2")) == 2


def test_clips_need_a_probe(folder):
    with pytest.raises(ConfigError, match=r"source\.probe"):
        plan(folder, "clips.length_s=2", "source.probe=false")


def test_named_rows_keep_their_names(folder):
    rows = [{"uri": "long.mp4", "id": "a"}, {"uri": "long.mp4", "id": "b", "start_s": 1, "end_s": 4.5}]
    path = manifest(folder, rows)
    assert plan(path)["id"].to_pylist() == ["a", "b"]
    assert plan(path, "clips.length_s=2")["id"].to_pylist() == ["a@0s", "a@2s", "a@4s", "b@1s", "b@3s"]
    assert plan(path, "clips.length_s=2")["end_s"].to_pylist() == [2.0, 4.0, None, 3.0, 4.5]


def test_repeated_names_are_errors_and_repeated_rows_are_counted(tmp_path):
    rows = [{"uri": f"{n}.mp4"} for n in (0, 1, 0, 2, 0)]
    table = plan(manifest(tmp_path, rows), "source.probe=false")
    assert len(table) == 3
    assert table.schema.metadata[b"repeated_rows"] == b"2"
    rows = [{"uri": f"{n}.mp4", "id": "same" if n in (1, 3) else str(n)} for n in range(4)]
    with pytest.raises(SourceError, match="row 4: id 'same' is already used by row 2"):
        plan(manifest(tmp_path, rows), "source.probe=false")


def test_image_sets_are_one_unit(tmp_path):
    for number in range(3):
        Image.fromarray(np.zeros((40 + number, 60, 3), np.uint8)).save(tmp_path / f"{number}.png")
    rows = [{"uris": ["0.png", "1.png", "2.png"], "prompt": "Which?"}, {"uris": ["0.png", "absent.png"]}]
    whole, broken = plan(manifest(tmp_path, rows), "clips.length_s=2").to_pylist()
    assert (whole["kind"], len(whole["uris"]), whole["height"], whole["width"]) == ("images", 3, 40, 60)
    assert whole["size_bytes"] == sum((tmp_path / f"{n}.png").stat().st_size for n in range(3))
    assert whole["prompts"] == [{"prompt_id": "prompt", "prompt": "Which?"}]
    assert broken["size_bytes"] is None
    assert "absent.png" in broken["probe_error"]


def test_a_manifest_of_ten_thousand_rows(tmp_path):
    rows = [{"uri": f"s3://b/{n // 2}.mp4", "start_s": n % 2} for n in range(10_000)]
    for name in ("m.jsonl", "m.parquet"):
        table = plan(manifest(tmp_path, rows, name), "source.probe=false")
        assert len(table) == len(set(table["id"].to_pylist())) == 10_000
        assert table["start_s"].to_pylist()[:3] == [0.0, 1.0, 0.0]
        assert table.schema.equals(UNIT_SCHEMA)


lengths = st.floats(0.1, 100).map(lambda value: round(value, 3))


@settings(deadline=None)
@given(lengths, lengths, lengths, st.booleans(), st.integers(0, 100))
def test_clips_cover_the_window_in_order(start, span, length, bounded, share):
    clips = Clips(length_s=length, min_length_s=min(length, length * share / 100))
    end = start + span
    bounds = cut(start, end if bounded else None, None if bounded else end, clips)
    assert bounds[0][0] == start
    assert bounds[-1][1] == (end if bounded else None)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))
    closed = [(a, b if b is not None else end) for a, b in bounds]
    assert all(b - a == pytest.approx(length, abs=1e-5) for a, b in closed[:-1])
    assert 0 < closed[-1][1] - closed[-1][0] <= length + clips.min_length_s + 1e-5
    assert len(bounds) == 1 or closed[-1][1] - closed[-1][0] >= clips.min_length_s - 1e-5


def test_strides_make_clips_overlap_or_leave_gaps():
    assert cut(None, None, 12, Clips(length_s=10, stride_s=5)) == [(0.0, 10.0), (5.0, None)]
    assert cut(None, None, 12, Clips(length_s=2, stride_s=5)) == [(0.0, 2.0), (5.0, 7.0), (10.0, None)]
    assert cut(None, None, 13, Clips(length_s=2, stride_s=5)) == [(0.0, 2.0), (5.0, 7.0), (10.0, 12.0)]


def test_a_short_last_clip_is_joined_to_the_one_before():
    assert cut(None, None, 21, Clips(length_s=10, min_length_s=2)) == [(0.0, 10.0), (10.0, None)]
    assert cut(None, None, 23, Clips(length_s=10, min_length_s=2))[-1] == (20.0, None)
    assert cut(None, 21.0, 30, Clips(length_s=10, min_length_s=2))[-1] == (10.0, 21.0)


def test_a_window_beyond_the_end_stays_as_it_is():
    assert cut(40.0, 50.0, 12, Clips(length_s=2)) == [(40.0, 50.0)]
    assert cut(3.0, 40.0, 8.0, Clips(length_s=2)) == [(3.0, 5.0), (5.0, 7.0), (7.0, 40.0)]
    assert cut(1.0, None, None, Clips(length_s=2)) == [(1.0, None)]
