"""Structured logs through the standard logging module: one JSON object per line.

    {"time": "2026-01-31T12:00:00.123456+00:00", "level": "INFO", "event": "unit finished", "run": "…", "actor": "…",
     "unit": "…", "uri": "s3://bucket/a.mp4", "status": "ok", "seconds": 1.24, …}

Model actors write to files in Ray's session folder, where `ray logs`, the dashboard and log collectors find them.
The driver's terminal shows text, or the same JSON lines with `run.log_format: json`. Logs contain no prompt texts,
credentials or URL signatures.
"""

import datetime
import json
import logging
import logging.handlers
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

_FILE_BYTES, _FILES = 64 << 20, 4
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN")
_NAMES = r"secret|password|signature|access_?key|(?:session|security|auth|api)[_-]?token"
_PATTERNS = (
    (re.compile(r"(\w://)[^\s/@]+@"), r"\1"),  # user:password@host
    (re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]+"), r"\1?…"),  # query strings hold signatures and tokens
    (re.compile(rf"(?i)\b(\w*(?:{_NAMES})\w*['\"]?\s*[=:]\s*['\"]?)[^\s'\",&]+"), r"\1…"),
)


def event(logger: logging.Logger, name: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """Log an event with its fields, except those that are None."""
    logger.log(level, name, extra={"fields": {key: value for key, value in fields.items() if value is not None}})


def unit_ended(logger: logging.Logger, unit: dict[str, Any], row: dict[str, Any]) -> None:
    """Log the result of a unit: finished, or skipped, failed or given up with stage, type and message."""
    common = {
        "unit": row["id"],
        "uri": row["uri"],
        "start_s": row["start_s"],
        "status": row["status"],
        "attempt": row["attempts"],
        "seconds": round((row["finished_at"] - row["started_at"]).total_seconds(), 4),
    }
    if row["error_type"] is None:
        parts = ("decode_s", "wait_s", "queue_s", "encode_s", "prefill_s", "generate_s")
        times = {name: round(row[name], 4) for name in parts if row[name] is not None}
        sizes = {name: row[name] for name in ("vision_tokens", "kept_tokens", "kv_bytes")}
        event(logger, "unit finished", **common, frames=len(row["frame_times_s"] or ()), **sizes, **times)
        return
    message = row["error_message"]
    for prompt in unit["prompts"]:
        message = message.replace(prompt["prompt"], "…") if prompt["prompt"].strip() else message
    failure = {"error_stage": row["error_stage"], "error_type": row["error_type"], "error_message": message}
    if row["status"] == "skipped":
        event(logger, "unit skipped", **common, **failure)
    else:
        name = "unit given up" if row["error_type"] == "ModelCrashed" else "unit failed"
        event(logger, name, level=logging.WARNING, **common, **failure)


class JsonLines(logging.Formatter):
    """Formats log records as JSON lines, each with the fields of `context`; records of other libraries too."""

    def __init__(self, **context: str) -> None:
        super().__init__()
        self._context = _clean(context)

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="microseconds"),
            "level": record.levelname,
            "event": _clean(record.getMessage()),
            **self._context,
            "logger": record.name,
            **_clean(getattr(record, "fields", {})),
        }
        if record.exc_info:
            line["exception"] = _clean(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False, default=str)


class _Files(logging.handlers.RotatingFileHandler):
    """Rotates once a file has reached `maxBytes`. The base class checks before writing, formatting every line twice."""

    def shouldRollover(self, record: logging.LogRecord) -> bool:  # noqa: N802
        return self.stream is not None and self.stream.tell() >= self.maxBytes


@contextmanager
def to_terminal(log_format: Literal["text", "json"]) -> Iterator[None]:
    """Log to stderr within the block: warnings as text, or every event and Ray's warnings as JSON."""
    handler = logging.StreamHandler()
    if log_format == "text":
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        handler.setLevel(logging.WARNING)
        with _attached(logging.getLogger("pipeline"), handler):
            yield
        return
    handler.setFormatter(JsonLines())
    rays = logging.getLogger("ray")
    with _attached(logging.getLogger("pipeline"), handler), _reformatted(rays.handlers, JsonLines()):
        yield


@contextmanager
def to_folder(folder: str | Path, name: str, **context: str) -> Iterator[None]:
    """Log to `folder/lightkv-NAME.jsonl` within the block, rotated every 64 MiB; errors also go to stderr."""
    path = Path(folder) / f"lightkv-{name}.jsonl"
    lines = _Files(path, maxBytes=_FILE_BYTES, backupCount=_FILES, encoding="utf-8")
    lines.setFormatter(JsonLines(**context))
    errors = logging.StreamHandler()
    errors.setLevel(logging.ERROR)
    with _attached(logging.getLogger("pipeline"), lines, errors):
        yield
    lines.close()


def redacted(text: str) -> str:
    """`text` without this process's credentials and without the user parts and query strings of URLs."""
    for name in _SECRETS:
        if secret := os.environ.get(name):
            text = text.replace(secret, "…")
    if "=" in text or ":" in text:  # every pattern needs one of them
        for pattern, replacement in _PATTERNS:
            text = pattern.sub(replacement, text)
    return text


@contextmanager
def _attached(logger: logging.Logger, *handlers: logging.Handler) -> Iterator[None]:
    level, propagate = logger.level, logger.propagate
    for handler in handlers:
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


@contextmanager
def _reformatted(handlers: list[logging.Handler], formatter: logging.Formatter) -> Iterator[None]:
    before = [(handler, handler.formatter) for handler in handlers]
    for handler in handlers:
        handler.setFormatter(formatter)
    try:
        yield
    finally:
        for handler, was in before:
            handler.setFormatter(was)


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _clean(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(inner) for inner in value]
    return redacted(value) if isinstance(value, str) else value
