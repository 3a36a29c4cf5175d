"""The report job: the page of a run, from a configuration or from the run's folder."""

import json

import pyarrow.parquet as pq
import pytest

from jobs import report
from pipeline.config import load_config
from pipeline.errors import ConfigError, RunError
from pipeline.run.directory import RunDirectory
from tests.pipeline.rows import row, rows, units


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run 1 – größe 🎬"
    folder.mkdir()
    config = tmp_path / "job.yaml"
    config.write_text(json.dumps({"source": {"uri": "/videos"}, "sink": {"uri": str(folder)}}))
    work = RunDirectory(load_config(config)).open()
    work.write_manifest(units("a"))
    (folder / "data").mkdir()
    pq.write_table(rows(row("a")), folder / "data" / "a.parquet")
    return folder, config


def _main(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["report", *map(str, arguments)])
    return report.main()


def test_the_page_lies_in_the_run_by_default(run, monkeypatch, capsys):
    folder, config = run
    assert _main(monkeypatch, "--config", config) == 0
    assert "a.mp4" in (folder / "_run" / "report.html").read_text(encoding="utf-8")
    assert f"{folder}/_run/report.html" in capsys.readouterr().out


def test_the_runs_folder_is_enough(run, monkeypatch, tmp_path):
    folder, _ = run
    assert _main(monkeypatch, "--run", folder, "--out", tmp_path / "page.html") == 0
    assert "a.mp4" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not (folder / "_run" / "report.html").exists()


def test_a_folder_and_a_configuration_contradict_each_other(run, monkeypatch):
    folder, config = run
    with pytest.raises(ConfigError, match="got both"):
        _main(monkeypatch, "--run", folder, "--config", config)


def test_a_folder_without_a_run_is_refused(monkeypatch, tmp_path):
    with pytest.raises(RunError, match="holds no run"):
        _main(monkeypatch, "--run", tmp_path)
