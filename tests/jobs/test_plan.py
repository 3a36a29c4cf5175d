"""The dry run: a table or JSON, without weights, Ray or a GPU."""

import json
import os
import re
import subprocess
import sys

import pytest

from jobs.cli import main_guard
from jobs.plan import main
from pipeline.config import load_config
from pipeline.planning.plan import plan_units
from tests.models import save_tiny_llava
from tests.pipeline.planning.test_known import record
from tests.videos import render


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan")
    (path / "videos").mkdir()
    render(path / "videos" / "a.mp4", count=40, fps=10)
    (path / "videos" / "b.mp4").write_text("no video")
    (path / "videos" / "c.txt").write_text("ignored")
    save_tiny_llava(path / "model")
    for weights in (path / "model").glob("*.safetensors"):
        weights.unlink()
    return path


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Run the job with these arguments: exit code, output, errors."""

    def call(*arguments):
        command = ["jobs.plan", "--set", f"source.uri={folder}/videos", "--set", "sink.uri=nowhere", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as end:
            main_guard(main)
        return end.value.code, *capsys.readouterr()

    return call


def test_json_has_the_counts_and_tokens_without_weights(folder, run):
    code, out, err = run("--json", "--set", f"model.path={folder}/model", "--set", "clips.length_s=2")
    assert (code, err) == (0, "")
    plan = json.loads(out)
    assert plan["note"] is None
    assert plan["total"]["units"] == 3
    assert plan["total"]["unprobed"] == plan["ignored_files"] == 1
    assert plan["total"]["vision_tokens"] == 4 * 16
    assert 0 < plan["total"]["kv_bytes"] < plan["total"]["kv_bytes_uncompressed"]
    assert list(plan["by_kind"]) == ["video"]


def test_the_table_says_what_a_person_wants_to_know(folder, run):
    code, out, _ = run("--set", f"model.path={folder}/model", "--set", "lightkv.retention=0.6")
    assert code == 0
    cells = dict(re.split(r"  +(?=\S+(?: [KMG]?i?B)?$)", line) for line in out.splitlines()[1:13])
    assert (cells["units"], cells["files"], cells["not probed"]) == ("2", "2", "1")
    assert cells["vision tokens"] == "64"
    assert cells["KV cache per unit at retention 0.6"].endswith("KiB")
    assert "1 other files in the source are left out" in out
    assert "likely to fail: decode: NotAVideo" in out


def test_units_that_the_context_of_the_model_cannot_hold_are_named(folder, run):
    options = ("--set", f"model.path={folder}/model", "--set", "frames.fps=10")
    _, out, _ = run(*options)
    assert re.search(r"^too long for the model +1$", out, re.MULTILINE)
    assert re.search(
        r"^will be refused: unit \S+: expected at most 512 positions .*, it needs 704 or more", out, re.MULTILINE
    )
    plan = json.loads(run("--json", *options)[1])
    assert plan["total"]["too_long"] == len(plan["refusals"]) == 1


def test_image_sets_and_videos_have_a_column_each(folder, run):
    (folder / "m.jsonl").write_text(
        '{"uri": "videos/a.mp4"}\n{"uris": ["i.png"], "id": "x"}\n{"uri": "videos/a.mp4"}\n'
    )
    _, out, _ = run("--set", f"source.uri={folder}/m.jsonl", "--set", f"model.path={folder}/model")
    assert out.splitlines()[0].split() == ["images", "video", "total"]
    assert out.splitlines()[1].split() == ["units", "1", "1", "2"]
    assert "1 manifest rows repeat another one" in out


def test_units_of_earlier_runs_are_counted_as_left_out(folder, run, tmp_path):
    overrides = [f"source.uri={folder}/videos", "sink.uri=out"]
    record(tmp_path / "run=1", plan_units(load_config(None, overrides)), ["ok", None])
    options = ("--set", f"source.known={tmp_path}", "--set", f"model.path={folder}/model")
    _, out, _ = run(*options)
    assert f"1 units have their row under {tmp_path} and are left out" in out
    assert json.loads(run("--json", *options)[1])["known_units"] == 1
    record(tmp_path / "run=2", plan_units(load_config(None, overrides)))
    assert json.loads(run("--json", *options)[1])["total"]["units"] == 0
    assert run(*options)[1].splitlines()[1].split() == ["units", "0"]


def test_without_compression_nothing_is_called_compressed(folder, run):
    _, out, _ = run("--set", f"model.path={folder}/model", "--set", "lightkv.enabled=false")
    assert "compression off" in out
    assert "uncompressed" not in out


def test_a_model_out_of_reach_leaves_the_counts(folder, run):
    code, out, err = run("--json", "--set", f"model.path={folder}/absent")
    assert code == 0
    plan = json.loads(out)
    assert (plan["total"]["units"], plan["total"]["frames"], plan["total"]["vision_tokens"]) == (2, 4, 0)
    assert plan["note"].startswith("tokens are not estimated: model.path")
    assert err == f"note: {plan['note']}\n"


def test_a_wrong_source_is_one_line_and_exit_code_2(folder, run):
    code, out, err = run("--set", f"source.uri={folder}/absent")
    assert (code, out) == (2, "")
    assert err.startswith("error: source.uri ")
    assert err.count("\n") == 1


def test_nothing_is_written_and_ray_is_not_even_imported(folder, tmp_path):
    script = (
        "import sys; from jobs.plan import main; main();"
        "print([m for m in sys.modules if m == 'ray' or m.startswith('ray.')])"
    )
    options = ["--set", f"source.uri={folder}/videos", "--set", "sink.uri=out", "--set", f"model.path={folder}/model"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", script, *options],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert os.listdir(tmp_path) == []
