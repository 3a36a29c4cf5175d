"""What the pages show: links, commands, files and figures exist, and the example runs on a tiny model of its family."""

import ast
import re
from pathlib import Path

import pytest
from PIL import Image

from jobs.measure.readme import PAGES as GENERATED
from jobs.measure.readme import RESULTS, filled
from tests.models import save_tiny_llava

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "lightkv/README.md",
    "pipeline/README.md",
    "infra/README.md",
    "jobs/results/README.md",
    "configs/README.md",
    "jobs/measure/gpu/README.md",
    "pipeline/mini/weights/README.md",
)
MOST_LINES = 150  # of the first page
ELSEWHERE = {"pip", "venv", "lmms_eval"}  # modules of other projects that the pages run
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"python -m ([\w.]+)((?:\\\n|[^`\n])*)")


def text(page):
    return (ROOT / page).read_text(encoding="utf-8")


def prose(page):
    return re.sub(r"^```.*?^```", "", text(page), flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """GitHub's: lower case, without punctuation, a hyphen for every space."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def module_file(name):
    """The file that `python -m NAME` runs; None where there is none."""
    path = ROOT / name.replace(".", "/")
    found = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    return found if found.exists() and (found.name == "__main__.py" or "__main__" in found.read_text()) else None


def options(file):
    """Every string of the module and of the command line that the jobs share."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in (file, ROOT / "jobs/cli.py"))
    return {node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)}


def test_first_page_is_short():
    assert len(text("README.md").splitlines()) <= MOST_LINES


def test_every_page_of_the_checkout_is_tested():
    rooms = ("lightkv", "pipeline", "jobs", "infra", "configs", "tests")
    found = [path for room in rooms for path in (ROOT / room).rglob("README.md")]
    assert {"README.md", *(path.relative_to(ROOT).as_posix() for path in found)} == set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in LINK.findall(prose(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.relative_to(ROOT)), link


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page):
    for name, rest in COMMAND.findall(text(page)):
        if name.split(".")[0] in ELSEWHERE:
            continue
        file = module_file(name)
        assert file is not None, name
        unknown = set(re.findall(r"(?<!\S)--[a-z][\w-]*", rest)) - options(file) - {"--help"}
        assert not unknown, f"{name}: {unknown}"


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([\w-]+)", text(page), re.MULTILINE)) <= targets


@pytest.mark.parametrize("page", PAGES)
def test_files_it_names_exist(page):
    named = set(re.findall(r"`((?:jobs|pipeline|lightkv|configs|tests|infra)/[\w./-]+)`", text(page)))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", GENERATED)
def test_its_figures_are_what_the_jobs_found(page):
    assert filled(text(page), GENERATED[page], RESULTS) == text(page)


def test_jobs_the_pages_name_exist():
    named = {name for page in PAGES for name in re.findall(r"`(jobs\.[a-z][\w.]*)`", text(page))}
    assert named
    assert [name for name in sorted(named) if name != "jobs.measure" and not module_file(name)] == []


def test_example_of_the_library_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", text("README.md"), re.DOTALL)
    assert len(code.splitlines()) <= 12
    folder = save_tiny_llava(tmp_path)
    Image.new("RGB", (48, 40), (200, 30, 30)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code.replace("llava-hf/llava-1.5-7b-hf", str(folder)), names)
    report = names["report"]
    assert report.vision_tokens == 16
    assert report.kept_tokens < 16
    assert str(report.kv_bytes) in capsys.readouterr().out
