"""Which tests may run beside each other under pytest-xdist: those of different files, but cluster tests one by one."""

from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # xdist's own reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests share its fixtures in one process; each cluster test fills the machine with a Ray of its own."""
    for item in items:
        place = item.path.relative_to(TESTS)
        group = "cluster" if place.parts[0] == "cluster" else str(place)
        item.add_marker(pytest.mark.xdist_group(group))
