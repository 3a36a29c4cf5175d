"""The command line that all jobs share."""

import subprocess
import sys

import pytest

from jobs.cli import load, main_guard, parser
from pipeline.config import JobConfig
from pipeline.errors import ConfigError


def _leaves(section, prefix=""):
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
            yield from _leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_help_config_lists_every_key_with_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        parser("").parse_args(["--help-config"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    listed = {line.split(" = ")[0].strip() for line in text.splitlines() if " = " in line}
    assert listed == set(_leaves(JobConfig))
    assert "lightkv.retention = 0.55" in text
    assert "source.uri = required" in text


def test_file_and_overrides_are_put_together(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text("source: {uri: a}\nsink: {uri: b}\nframes: {fps: 2}\n")
    arguments = parser("").parse_args(["--config", str(file), "--set", "frames.fps=4", "--set", "sink.uri=c"])
    job = load(arguments)
    assert (job.source.uri, job.sink.uri, job.frames.fps) == ("a", "c", 4.0)


def test_user_errors_are_one_line_and_exit_code_2(capsys):
    def refuse():
        raise ConfigError("frames.fps: expected a number, got 'x'")

    with pytest.raises(SystemExit) as end:
        main_guard(refuse)
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: frames.fps: expected a number, got 'x'\n"


def test_other_errors_are_not_hidden():
    def broken():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        main_guard(broken)


@pytest.mark.parametrize("job", ["plan", "caption", "retry"])
def test_help_shows_options_and_an_example(job):
    text = subprocess.run(
        [sys.executable, "-m", f"jobs.{job}", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "--config" in text
    assert "--set" in text
    assert f"python -m jobs.{job} --config" in text
