"""Tests of sources: folders, files and manifests, and the error for each wrong one."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from pipeline.config import load_config
from pipeline.errors import SourceError
from pipeline.planning.sources import Item, find
from pipeline.storage import files as st
from tests.s3 import server


def config(uri, *overrides):
    return load_config(None, [f"source.uri={json.dumps(str(uri))}", "sink.uri=out", *overrides])


def items(uri, *overrides):
    return list(find(config(uri, *overrides)).items)


def refusal(uri, *overrides):
    with pytest.raises(SourceError) as caught:
        items(uri, *overrides)
    assert str(uri) in str(caught.value)
    return str(caught.value)


def manifest(folder, rows, name="m.jsonl"):
    """Write `rows` as a manifest; a JSONL row may be raw text."""
    path = folder / name
    if name.endswith(".parquet"):
        names = dict.fromkeys(name for row in rows for name in row)
        pyarrow.parquet.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path)
    else:
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_a_folder_gives_its_videos_by_name(tmp_path):
    for name in ("b.mp4", "a.MKV", "deep/er/c.webm", ".hidden.mp4", ".cache/d.mp4", "notes.txt", "i.jpg", "x.mp4.part"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.mp4").mkdir()
    found = find(config(tmp_path))
    taken = list(found.items)
    assert [item.uris[0].removeprefix(f"{tmp_path}/") for item in taken] == ["a.MKV", "b.mp4", "deep/er/c.webm"]
    assert found.ignored == 5
    assert all(item.kind == "video" and item.entry.size_bytes == 1 for item in taken)
    assert len(items(tmp_path, "source.recursive=false")) == 2
    assert [item.uris[0][-5:] for item in items(tmp_path, "source.extensions=[txt]")] == ["s.txt"]


def test_a_hidden_folder_may_be_named_itself(tmp_path):
    (tmp_path / ".data").mkdir()
    (tmp_path / ".data" / "v.mp4").write_bytes(b"x")
    assert len(items(tmp_path / ".data")) == 1


def test_relative_folders_become_absolute(tmp_path, monkeypatch):
    (tmp_path / "v.mp4").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    assert items(".")[0].uris == (str(tmp_path / "v.mp4"),)
    assert items("v.mp4")[0].uris == items(tmp_path.as_uri())[0].uris


def test_one_file_is_a_source(tmp_path):
    for name, kind in (("clip.bin", "video"), ("photo.PNG", "images")):
        (tmp_path / name).write_bytes(b"x")
        (item,) = items(tmp_path / name)
        assert (item.kind, item.uris) == (kind, (str(tmp_path / name),))


def test_a_bucket_gives_its_videos(tmp_path):
    with server("listing") as storage:
        for key in (
            "in/b.mp4",
            "in/a.mp4",
            "in/sub/c.mp4",
            "in/",
            "in/sub/",
            "in/readme.md",
            "other/d.mp4",
            "in2/e.mp4",
        ):
            st.write_bytes_atomic(f"s3://listing/{key}", b"xy", storage)
        st.write_bytes_atomic("s3://listing/in/m.jsonl", b'{"uri": "a.mp4"}\n{"uri": "s3://else/x.mp4"}\n', storage)
        reach = [f"storage.endpoint_url={storage.endpoint_url}", "storage.max_attempts=1"]
        uris = [item.uris[0] for item in items("s3://listing/in", *reach)]
        assert uris == ["s3://listing/in/a.mp4", "s3://listing/in/b.mp4", "s3://listing/in/sub/c.mp4"]
        assert [item.uris[0] for item in items("s3://listing/in/", *reach)] == uris
        assert len(items("s3://listing", *reach)) == 5
        assert len(items("s3://listing/in", "source.recursive=false", *reach)) == 2
        listed = [item.uris[0] for item in items("s3://listing/in/m.jsonl", *reach)]
        assert listed == ["s3://listing/in/a.mp4", "s3://else/x.mp4"]
        assert "no such file" in refusal("s3://listing/absent", *reach)
        assert "no such bucket" in refusal("s3://absent/in", *reach)


def test_sources_without_videos_say_what_was_looked_for(tmp_path):
    assert "no such file" in refusal(tmp_path / "absent")
    (tmp_path / "a.txt").write_text("x")
    message = refusal(tmp_path)
    assert "found none among 1 files" in message
    assert ".mp4" in message
    assert "a manifest must be .parquet or .jsonl, got .txt" in refusal(tmp_path / "a.txt")
    assert "at least one row" in refusal(manifest(tmp_path, []))
    assert "at least one row" in refusal(manifest(tmp_path, ["", "  "]))


FULL = [
    {"uri": "a.mp4", "id": "first", "start_s": 1.5, "end_s": 3.0, "prompt": "What?"},
    {"uris": ["i/1.jpg", "/abs/2.jpg"], "prompts": [{"prompt_id": "q", "prompt": "Which?"}]},
    {"uri": "one.png", "kind": "images"},
    {"uri": "s3://bucket/b.mp4", "kind": "video"},
]


@pytest.mark.parametrize("name", ["m.jsonl", "m.parquet"])
def test_manifest_rows_become_items(tmp_path, name):
    base = str(tmp_path)
    assert items(manifest(tmp_path, FULL, name)) == [
        Item("video", (f"{base}/a.mp4",), "first", 1.5, 3.0, (("prompt", "What?"),), row=1),
        Item("images", (f"{base}/i/1.jpg", "/abs/2.jpg"), prompts=(("q", "Which?"),), row=2),
        Item("images", (f"{base}/one.png",), row=3),
        Item("video", ("s3://bucket/b.mp4",), row=4),
    ]


def test_kinds_follow_from_names_and_columns(tmp_path):
    rows = [{"uri": "x.jpeg"}, {"uris": ["frames.mp4"]}, {"uris": ["v.mp4"], "kind": "video"}, {"uri": "no-extension"}]
    kinds = [item.kind for item in items(manifest(tmp_path, rows))]
    assert kinds == ["images", "images", "video", "video"]


def test_questions_in_a_list_are_numbered(tmp_path):
    (item,) = items(manifest(tmp_path, [{"uri": "a.mp4", "prompts": ["Who?", "Where?"]}]))
    assert item.prompts == (("prompt_1", "Who?"), ("prompt_2", "Where?"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"url": "a.mp4"}, "unknown column url; did you mean uri?"),
        ({"uri": "a.mp4", "caption": "x"}, "unknown column caption"),
        ({"id": "x"}, "expected either uri or uris"),
        ({"uri": "a.mp4", "uris": ["b.mp4"]}, "got both"),
        ({"uri": ""}, "expected uri as a string"),
        ({"uri": 3}, "got 3"),
        ({"uris": []}, "got []"),
        ({"uris": "a.mp4"}, "uris as a list"),
        ({"uris": ["a.jpg", None]}, "uris as a list"),
        ({"uri": "a.mp4", "kind": "audio"}, "expected video or images, got 'audio'"),
        ({"uris": ["a.mp4", "b.mp4"], "kind": "video"}, "a video has one uri, got 2"),
        ({"uri": "a.mp4", "start_s": "1"}, "start_s: expected seconds of at least 0, got '1'"),
        ({"uri": "a.mp4", "start_s": -1}, "got -1"),
        ({"uri": "a.mp4", "end_s": True}, "got True"),
        ('{"uri": "a.mp4", "end_s": NaN}', "got nan"),
        ({"uri": "a.mp4", "start_s": 4, "end_s": 4}, "expected more than start_s (4.0), got 4.0"),
        ({"uri": "a.jpg", "start_s": 1}, "start_s and end_s are for videos"),
        ({"uri": "a.mp4", "id": ""}, "id: expected a non-empty string"),
        ({"uri": "a.mp4", "id": 7}, "got 7"),
        ({"uri": "a.mp4", "prompt": "x", "prompts": ["y"]}, "expected either prompt or prompts"),
        ({"uri": "a.mp4", "prompts": []}, "expected a list of prompts"),
        ({"uri": "a.mp4", "prompts": ["x", ""]}, "expected non-empty strings"),
        ({"uri": "a.mp4", "prompts": [{"id": "x", "prompt": "y"}]}, "{prompt_id, prompt}"),
        ({"uri": "a.mp4", "prompts": [{"prompt_id": "x", "prompt": "y"}] * 2}, "every prompt_id must be unique"),
    ],
)
def test_a_wrong_row_names_itself_and_what_was_expected(tmp_path, row, message):
    text = refusal(manifest(tmp_path, [{"uri": "good.mp4"}, row]))
    assert "row 2: " in text
    assert message in text


def test_the_first_few_wrong_rows_are_shown_together(tmp_path):
    text = refusal(manifest(tmp_path, [{"uri": "a.mp4"}, *([{"uri": "b.mp4", "kind": "x"}] * 20)]))
    assert [f"row {n}:" in text for n in (1, 2, 6, 7)] == [False, True, True, False]


def test_files_that_are_no_manifests_are_refused(tmp_path):
    assert "line 2 is not JSON" in refusal(manifest(tmp_path, [{"uri": "a.mp4"}, "{uri: a.mp4}"]))
    assert "line 1: expected an object" in refusal(manifest(tmp_path, ["[1, 2]"]))
    (tmp_path / "latin.jsonl").write_bytes(b'{"uri": "gr\xfc\xdfe.mp4"}\n')
    assert "expected UTF-8" in refusal(tmp_path / "latin.jsonl")
    (tmp_path / "text.parquet").write_text("no parquet")
    assert "cannot be read as a Parquet file" in refusal(tmp_path / "text.parquet")
    wrong = manifest(tmp_path, [{"uri": "a.mp4", "file": "x"}], "wrong.parquet")
    assert "unknown column file" in refusal(wrong)


def test_empty_cells_are_absent_and_a_byte_order_mark_is_skipped(tmp_path):
    path = manifest(tmp_path, [{"uri": "a.mp4", "id": None, "start_s": None, "prompts": None}])
    path.write_text("\ufeff" + path.read_text(), encoding="utf-8")
    assert items(path) == [Item("video", (str(tmp_path / "a.mp4"),), row=1)]
