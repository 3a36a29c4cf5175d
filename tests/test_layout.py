"""The folders as a map: imports between rooms go one way, modules import each other in no circle, no folder is crowded.

Imports under TYPE_CHECKING and within functions count like all others.
"""

import ast
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("lightkv", "pipeline", "jobs")
MOST_FILES = 18  # Python files in a folder

# From the ground up. A room knows the rooms of the lines before its own, but none in its own line.
# A package's name stands for the files that lie in the package itself.
ROOMS = [
    ["lightkv.errors"],
    ["lightkv.ops"],
    ["lightkv.vision"],
    ["lightkv.methods"],
    ["lightkv.hooks", "lightkv.engine"],
    ["lightkv"],
    ["pipeline"],
    ["pipeline.storage", "pipeline.mini"],
    ["pipeline.decoding"],
    ["pipeline.planning", "pipeline.run"],
    ["pipeline.captioning"],
    ["pipeline.cluster"],
    ["pipeline.job"],
    ["jobs"],
    ["jobs.schedule", "jobs.measure"],
]
LEVELS = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
KNOWS_RAY = "pipeline.cluster"


@cache
def modules() -> dict[str, Path]:
    """Name → file of every module of the three packages."""
    files = (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


@cache
def imports() -> dict[str, set[str]]:
    """Name → the modules of the three packages that the module imports, wherever in it."""
    return {
        name: {known for target in imported(path) if (known := module_in(target))} for name, path in modules().items()
    }


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_in(target: str) -> str | None:
    """The module that `import target`, or `from … import …` of that name, names; None outside the three packages."""
    return next((name for name in (target, target.rpartition(".")[0]) if name in modules()), None)


def room_of(module: str) -> str:
    parts = module.split(".")
    return next(room for count in range(len(parts), 0, -1) if (room := ".".join(parts[:count])) in LEVELS)


def may_know(one: str, other: str) -> bool:
    return one == other or LEVELS[other] < LEVELS[one]


def arrows_up() -> list[str]:
    return [
        f"{one} -> {other}"
        for one, others in imports().items()
        for other in sorted(others)
        if not may_know(room_of(one), room_of(other))
    ]


def circles() -> list[str]:
    """Modules that import each other, by way of others or not: one line for each such group."""
    reached = {name: _reached(name) for name in modules()}
    groups = {frozenset(other for other in reached[name] if name in reached[other]) for name in modules()}
    return sorted(" <-> ".join(sorted(group)) for group in groups if group)


def _reached(name: str) -> set[str]:
    found: set[str] = set()
    ahead = [name]
    while ahead:
        fresh = imports()[ahead.pop()] - found
        found |= fresh
        ahead += fresh
    return found


def test_imports_go_one_way():
    found = arrows_up()
    assert not found, "\n".join(found)


def test_no_modules_import_each_other_in_a_circle():
    found = circles()
    assert not found, "\n".join(found)


def test_only_the_cluster_knows_ray():
    knowing = {
        room_of(name) for name, path in modules().items() if "ray" in {one.split(".")[0] for one in imported(path)}
    }
    assert {room for room in knowing if room.startswith("pipeline")} == {KNOWS_RAY}


def test_every_folder_is_a_room_or_lies_in_one():
    folders = {name for name, path in modules().items() if path.name == "__init__.py"}
    assert [name for name in folders if name not in PACKAGES and room_of(name) in PACKAGES] == []


@pytest.mark.parametrize("package", [*PACKAGES, "tests"])
def test_no_folder_is_crowded(package):
    folders = {path.parent for path in (ROOT / package).rglob("*.py")}
    counts = {str(folder.relative_to(ROOT)): len(list(folder.glob("*.py"))) for folder in folders}
    assert {folder: count for folder, count in counts.items() if count > MOST_FILES} == {}


def test_every_folder_is_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {name for name, path in modules().items() if path.name == "__init__.py"}
    assert set(project["tool"]["setuptools"]["packages"]) == folders


@pytest.mark.parametrize("room", [room for room in LEVELS if (ROOT / room.replace(".", "/") / "ruff.toml").exists()])
def test_lint_refuses_what_a_room_must_not_know(room):
    lint = tomllib.loads((ROOT / room.replace(".", "/") / "ruff.toml").read_text(encoding="utf-8"))["lint"]
    banned = {name for name in lint["flake8-tidy-imports"]["banned-api"] if name.split(".")[0] in PACKAGES}
    assert [name for name in banned if may_know(room, room_of(name))] == []
    inside = {other for other in LEVELS if other.split(".")[0] == room.split(".")[0] and other not in PACKAGES}
    assert {other for other in inside if not may_know(room, other)} <= banned


def test_every_room_has_its_lint():
    rooms = {room for room in LEVELS if (ROOT / room.replace(".", "/")).is_dir() and not room.startswith("jobs")}
    assert {room for room in rooms if not (ROOT / room.replace(".", "/") / "ruff.toml").exists()} == {"lightkv"}
