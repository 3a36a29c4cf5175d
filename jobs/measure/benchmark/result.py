"""The benchmark's result file: always complete, with an entry for every cell, reached or not."""

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers

import lightkv
from jobs.measure.benchmark.cell import Cell, Values, not_measured
from jobs.measure.benchmark.derive import derive


class ResultFile:
    """Writes the header and all cells to `path` at the start; `put` sets one cell and replaces the file."""

    def __init__(self, path: Path, header: Values, cells: Sequence[Cell]) -> None:
        self.path = path
        self.header = header
        self.cells: list[Values] = [cell.key | not_measured("not reached") for cell in cells]
        self.write()

    def put(self, index: int, values: Values) -> None:
        key = {name: self.cells[index][name] for name in ("suite", "name", "at")}
        self.cells[index] = key | values
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        making = self.path.with_name(f"{self.path.name}.making")
        text = json.dumps(self.header | {"cells": derive(self.cells)}, indent=1, ensure_ascii=False)
        making.write_text(text + "\n", encoding="utf-8")
        os.replace(making, self.path)


def versions() -> dict[str, str | None]:
    """Versions of the packages that figures depend on; lightkv's includes a digest of its sources."""
    digest, root = hashlib.sha256(), Path(lightkv.__path__[0])
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "transformers": transformers.__version__,
        "lightkv": f"{_installed('lightkv') or '0'}+src.{digest.hexdigest()[:12]}",
    }


def device(of: torch.device) -> dict[str, Any]:
    """Type and name of the device, with memory or cores."""
    if of.type == "cuda":
        properties = torch.cuda.get_device_properties(of)
        return {"type": "cuda", "name": properties.name, "memory_bytes": properties.total_memory}
    return {"type": "cpu", "name": platform.processor() or platform.machine(), "cores": os.cpu_count()}


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
