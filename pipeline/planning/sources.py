"""Lists what to caption: the videos of a folder, one file, or the rows of a manifest.

A manifest is a `.parquet` or `.jsonl` file with the columns

    uri | uris     one video, or the images of a set; relative to the manifest's folder
    id             optional id of the unit, unique
    kind           optional: video | images; default: images with `uris` or an image's extension, else video
    start_s end_s  optional window of a video, in seconds
    prompt         optional prompt that replaces the configured prompts
    prompts        optional list of prompts: strings, or {prompt_id, prompt}

Image sets come from manifests only, as a folder does not define which images form a set.
"""

import difflib
import io
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from pipeline.config import JobConfig
from pipeline.errors import SourceError
from pipeline.planning.probe import is_image
from pipeline.storage import files as st

COLUMNS = ("uri", "uris", "id", "kind", "start_s", "end_s", "prompt", "prompts")
_BATCH_ROWS = 4096
_SHOWN_ERRORS = 5


@dataclass(frozen=True)
class Item:
    """One video or image set of the source, before it is probed and cut into units."""

    kind: str  # video | images
    uris: tuple[str, ...]
    id: str | None = None
    start_s: float | None = None
    end_s: float | None = None
    prompts: tuple[tuple[str, str], ...] | None = None  # (prompt_id, prompt); None: the configured prompts
    entry: st.Entry | None = None  # from the listing
    row: int | None = None  # row number in the manifest, from 1


@dataclass
class Found:
    """The items of a source, read lazily, and how many files are ignored."""

    items: Iterator[Item]
    ignored: int = 0


def find(config: JobConfig) -> Found:
    """The items of `config.source`, in a fixed order. Raises `SourceError` if it cannot be read or is empty."""
    source, storage = config.source, config.storage
    uri = source.uri
    suffix = os.path.splitext(uri.rstrip("/"))[1].lower()
    try:
        folder = st.is_folder(uri, storage)
    except st.StorageError as error:
        expected = "a folder, s3://bucket/prefix, a video, or a .parquet or .jsonl manifest"
        raise SourceError(f"source.uri {uri}: expected {expected}; {error}") from error
    if not folder:
        if suffix in (".parquet", ".jsonl"):
            return Found(_checked(_manifest_rows(uri, config), uri))
        if suffix in (".csv", ".tsv", ".json", ".txt", ".yaml", ".yml"):
            raise SourceError(f"source.uri {uri}: a manifest must be .parquet or .jsonl, got {suffix}")
        entry = st.stat(uri, storage)
        return Found(iter([Item("images" if is_image(uri) else "video", (_absolute(uri),), entry=entry)]))
    entries = st.list_files(uri, storage, recursive=source.recursive)
    chosen = [e for e in entries if _is_video(e.uri, _absolute(uri), source.extensions)]
    if not chosen:
        below = "in it and below" if source.recursive else "directly in it"
        raise SourceError(
            f"source.uri {uri}: expected at least one video ({', '.join(source.extensions)}), found none among "
            f"{len(entries)} files {below}; name a folder with videos, set source.extensions, or give a manifest"
        )
    return Found((Item("video", (e.uri,), entry=e) for e in chosen), ignored=len(entries) - len(chosen))


def _absolute(uri: str) -> str:
    """The URI as stored in units: local paths are made absolute."""
    return uri if st.is_s3(uri) else os.path.abspath(st.local_path(uri))


def _is_video(uri: str, folder: str, extensions: tuple[str, ...]) -> bool:
    path = PurePosixPath(uri.removeprefix(folder))
    return path.suffix.lower() in extensions and not any(part.startswith(".") for part in path.parts)


def _checked(rows: Iterable[Item], uri: str) -> Iterator[Item]:
    none = True
    for item in rows:
        none = False
        yield item
    if none:
        raise SourceError(f"source.uri {uri}: expected a manifest with at least one row, found none")


def _manifest_rows(uri: str, config: JobConfig) -> Iterator[Item]:
    """All rows, in order. The first few errors are raised together, each with its row number."""
    data = st.read_bytes(uri, config.storage)
    rows = _parquet_rows(data, uri) if uri.lower().endswith(".parquet") else _jsonl_rows(data, uri)
    base = _absolute(uri).rpartition("/")[0]
    errors: list[str] = []
    for number, row in rows:
        try:
            item = _item(row, base, number)
        except ValueError as error:
            errors.append(f"row {number}: {error}")
            if len(errors) == _SHOWN_ERRORS:
                break
        else:
            if not errors:
                yield item
    if errors:
        raise SourceError(f"source.uri {uri}: " + "\n  ".join(["the manifest has errors:", *errors]))


def _parquet_rows(data: bytes, uri: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        file = pyarrow.parquet.ParquetFile(pa.BufferReader(data))
        if unknown := sorted(set(file.schema_arrow.names) - set(COLUMNS)):
            raise SourceError(f"source.uri {uri}: {_unknown(unknown)}")
        number = 0
        for batch in file.iter_batches(batch_size=_BATCH_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"source.uri {uri}: cannot be read as a Parquet file ({_line(error)})") from error


def _jsonl_rows(data: bytes, uri: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        for number, line in enumerate(io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig"), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise SourceError(f"source.uri {uri}: line {number} is not JSON ({error.msg})") from None
            if not isinstance(row, dict):
                raise SourceError(f"source.uri {uri}: line {number}: expected an object, got {line.strip()[:60]}")
            yield number, row
    except UnicodeDecodeError as error:
        raise SourceError(f"source.uri {uri}: expected UTF-8, found {_line(error)}") from error


def _item(row: dict[str, Any], base: str, number: int) -> Item:
    """Check one manifest row and turn it into an item. Raises ValueError."""
    row = {key: value for key, value in row.items() if value is not None}
    if unknown := sorted(set(row) - set(COLUMNS)):
        raise ValueError(_unknown(unknown))
    uris = tuple(st.join(base, uri) for uri in _uris(row))
    kind = row.get("kind", "images" if "uris" in row or is_image(uris[0]) else "video")
    if kind not in ("video", "images"):
        raise ValueError(f"kind: expected video or images, got {kind!r}")
    if kind == "video" and len(uris) > 1:
        raise ValueError(f"a video has one uri, got {len(uris)}")
    start, end = _seconds(row, "start_s"), _seconds(row, "end_s")
    if kind == "images" and (start, end) != (None, None):
        raise ValueError("start_s and end_s are for videos, this row holds images")
    if end is not None and end <= (start or 0.0):
        raise ValueError(f"end_s: expected more than start_s ({start or 0.0}), got {end}")
    name = row.get("id")
    if name is not None and not (isinstance(name, str) and name.strip()):
        raise ValueError(f"id: expected a non-empty string, got {name!r}")
    return Item(kind, uris, name, start, end, _prompts(row), row=number)


def _uris(row: dict[str, Any]) -> list[str]:
    if ("uri" in row) == ("uris" in row):
        raise ValueError("expected either uri or uris" + (", got both" if "uri" in row else ""))
    uris = [row["uri"]] if "uri" in row else row["uris"]
    if not isinstance(uris, list) or not uris or not all(isinstance(uri, str) and uri.strip() for uri in uris):
        raise ValueError(
            f"expected uri as a string or uris as a list of strings, got {row.get('uri', row.get('uris'))!r}"
        )
    return uris


def _seconds(row: dict[str, Any], name: str) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}: expected seconds of at least 0, got {value!r}")
    return float(value)


def _prompts(row: dict[str, Any]) -> tuple[tuple[str, str], ...] | None:
    if "prompt" in row and "prompts" in row:
        raise ValueError("expected either prompt or prompts, got both")
    if "prompt" not in row and "prompts" not in row:
        return None
    given = row.get("prompts", [row.get("prompt")])
    if not isinstance(given, list) or not given:
        raise ValueError(f"prompts: expected a list of prompts, got {given!r}")
    numbered = "prompt" if "prompt" in row else None
    pairs = []
    for number, one in enumerate(given, start=1):
        if isinstance(one, str):
            one = {"prompt_id": numbered or f"prompt_{number}", "prompt": one}
        if not isinstance(one, dict) or set(one) != {"prompt_id", "prompt"}:
            raise ValueError(f"prompts: expected strings or {{prompt_id, prompt}}, got {one!r}")
        if not all(isinstance(text, str) and text.strip() for text in one.values()):
            raise ValueError(f"prompts: expected non-empty strings, got {one!r}")
        pairs.append((one["prompt_id"], one["prompt"]))
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError(f"prompts: every prompt_id must be unique, got {[name for name, _ in pairs]}")
    return tuple(pairs)


def _unknown(names: list[str]) -> str:
    close = difflib.get_close_matches(names[0], COLUMNS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"the columns are {', '.join(COLUMNS)}"
    return f"unknown column{'s' * (len(names) > 1)} {', '.join(names)}; {hint}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
