"""What the README shows runs as it stands, on a tiny model of the same family."""

import re
from pathlib import Path

from PIL import Image

from jobs.measure.readme import filled
from tests.models import save_tiny_llava

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_example_of_the_library_runs(tmp_path, monkeypatch, capsys):
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "compress" in block)
    folder = save_tiny_llava(tmp_path)
    Image.new("RGB", (48, 40), (200, 30, 30)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code.replace("llava-hf/llava-1.5-7b-hf", str(folder)), names)
    report = names["report"]
    assert report.vision_tokens == 16
    assert report.kept_tokens < 16
    assert str(report.kv_bytes) in capsys.readouterr().out


def test_files_the_readme_names_are_there():
    root = Path(__file__).parents[1]
    named = set(re.findall(r"`((?:jobs|pipeline|lightkv|configs|tests|infra)/[\w./-]+)`", README))
    assert named
    assert [name for name in sorted(named) if not (root / name).exists()] == []


def test_its_figures_are_what_the_jobs_found():
    assert filled(README, Path(__file__).parents[1] / "jobs/results") == README
