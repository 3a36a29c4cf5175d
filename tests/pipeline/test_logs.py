"""Tests of logs: one JSON object per line, which names the unit and contains no credentials."""

import json
import logging
from datetime import UTC, datetime, timedelta

import pytest

from pipeline import logs
from tests.pipeline.rows import row, unit

_LOG = logging.getLogger("pipeline.test")
_BEGAN = datetime(2026, 1, 31, 12, tzinfo=UTC)


def _ended(status="ok", **values):
    times = {"started_at": _BEGAN, "finished_at": _BEGAN + timedelta(seconds=1.5)}
    return row("a", status, **(times | values))


@pytest.fixture
def lines(tmp_path):
    """Log to a file within the test; returns a function that parses its lines."""
    with logs.to_folder(tmp_path, "actor-1", run="r", actor="x"):
        yield lambda: [json.loads(line) for line in (tmp_path / "lightkv-actor-1.jsonl").read_text().splitlines()]


def test_event_is_one_line_with_time_level_context_and_fields(lines):
    logs.event(_LOG, "actor started", load_s=1.25, device=None, note="two\nlines")
    (line,) = lines()
    assert datetime.fromisoformat(line.pop("time")).tzinfo is not None
    assert line == {
        "level": "INFO",
        "event": "actor started",
        "run": "r",
        "actor": "x",
        "logger": "pipeline.test",
        "load_s": 1.25,
        "note": "two\nlines",
    }


def test_finished_unit_tells_its_id_uri_and_seconds(lines):
    logs.unit_ended(_LOG, unit("a"), _ended("truncated", frame_times_s=[0.0], decode_s=0.5, wait_s=0.25, kv_bytes=7))
    (line,) = lines()
    expected = {"event": "unit finished", "unit": "a", "uri": "a.mp4", "status": "truncated", "frames": 1}
    assert expected.items() <= line.items()
    assert (line["seconds"], line["decode_s"], line["wait_s"], line["kv_bytes"]) == (1.5, 0.5, 0.25, 7)
    assert "encode_s" not in line


@pytest.mark.parametrize(("status", "level", "name"), [("error", "WARNING", "failed"), ("skipped", "INFO", "skipped")])
def test_unit_without_answer_tells_stage_type_and_message(lines, status, level, name):
    failure = {"error_stage": "decode", "error_type": "Broken", "error_message": "bad"}
    logs.unit_ended(_LOG, unit("a"), _ended(status, **failure))
    (line,) = lines()
    assert (failure | {"event": f"unit {name}", "level": level, "unit": "a"}).items() <= line.items()


def test_prompts_stay_out_of_messages(lines):
    asked = unit("a", prompts=[{"prompt_id": "p", "prompt": "Who is Jane Doe?"}, {"prompt_id": "q", "prompt": " "}])
    logs.unit_ended(_LOG, asked, _ended("error", error_message="cannot tokenise 'Who is Jane Doe?' now"))
    assert lines()[0]["error_message"] == "cannot tokenise '…' now"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("https://user:pass@host/a.mp4 gone", "https://host/a.mp4 gone"),
        ("GET https://h/a.mp4?X-Amz-Signature=abc&x=1 failed", "GET https://h/a.mp4?… failed"),
        ("aws_secret_access_key=abc/def+1 rejected", "aws_secret_access_key=… rejected"),
        ("{'SessionToken': 'abc', 'n': 1}", "{'SessionToken': '…', 'n': 1}"),
        ("s3://bucket/a folder/what?.mp4", "s3://bucket/a folder/what?.mp4"),
        ("lower model.max_new_tokens: 128", "lower model.max_new_tokens: 128"),
    ],
)
def test_what_gives_access_is_left_out(text, clean):
    assert logs.redacted(text) == clean


def test_credentials_of_this_process_are_left_out_wherever_they_stand(lines, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    try:
        raise ValueError("signed with wJalrXUtnFEMI")
    except ValueError:
        _LOG.exception("failed with %s", "wJalrXUtnFEMI")
    (line,) = lines()
    assert "wJalrXUtnFEMI" not in json.dumps(line)
    assert "ValueError: signed with …" in line["exception"]


def test_json_on_the_terminal_is_json_alone(capsys):
    with logs.to_terminal("json"):
        logs.event(_LOG, "progress", done=3)
        _LOG.warning("slow: %d s", 5)
    written = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in written] == ["progress", "slow: 5 s"]


def test_text_on_the_terminal_is_warnings_alone(capsys):
    with logs.to_terminal("text"):
        logs.event(_LOG, "progress", done=3)
        _LOG.warning("slow: %d s", 5)
    assert capsys.readouterr().err == "WARNING: slow: 5 s\n"


def test_a_full_file_is_followed_by_a_new_one_and_every_line_is_formatted_once(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "_FILE_BYTES", 200)
    formatted = []
    plain = logs.JsonLines.format
    monkeypatch.setattr(logs.JsonLines, "format", lambda self, record: formatted.append(record) or plain(self, record))
    with logs.to_folder(tmp_path, "a"):
        for number in range(8):
            logs.event(logging.getLogger("pipeline.test"), "told", number=number)
    files = sorted(tmp_path.iterdir(), key=lambda path: path.name, reverse=True)  # the oldest has the highest number
    assert [path.name for path in files] == [
        "lightkv-a.jsonl.3",
        "lightkv-a.jsonl.2",
        "lightkv-a.jsonl.1",
        "lightkv-a.jsonl",
    ]
    told = [[json.loads(line)["number"] for line in path.read_text().splitlines()] for path in files]
    assert told == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert len(formatted) == 8


def test_loggers_are_as_before_afterwards(tmp_path):
    logger = logging.getLogger("pipeline")
    before = logger.level, logger.propagate, list(logger.handlers)
    with logs.to_folder(tmp_path, "a"), logs.to_terminal("json"):
        assert len(logger.handlers) == len(before[2]) + 3
    assert (logger.level, logger.propagate, logger.handlers) == before
