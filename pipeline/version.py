"""Identifies the code that wrote a row: the package version and a digest of the sources."""

import functools
import hashlib
from importlib import metadata
from pathlib import Path

import lightkv
import pipeline


@functools.cache
def code_version() -> str:
    """`VERSION+src.DIGEST`; the digest is over the Python sources of `lightkv` and `pipeline`."""
    try:
        version = metadata.version("lightkv")
    except metadata.PackageNotFoundError:  # run from a source folder, like a submitted job
        version = "0"
    digest = hashlib.sha256()
    for package in (lightkv, pipeline):
        root = Path(package.__path__[0])
        for path in sorted(root.rglob("*.py")):
            digest.update(path.relative_to(root.parent).as_posix().encode() + b"\0" + path.read_bytes())
    return f"{version}+src.{digest.hexdigest()[:12]}"
