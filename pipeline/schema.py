"""Schemas of a run's two tables: units (the work) and rows (the results). Every unit gets one row."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

PROMPT = pa.struct([("prompt_id", pa.string()), ("prompt", pa.string())])

UNIT_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),  # video | images
        pa.field("uris", pa.list_(pa.string()), nullable=False),  # one for a video, one or more for an image set
        pa.field("etag", pa.string()),  # of the first object, from the storage
        pa.field("size_bytes", pa.int64()),  # of all objects together
        pa.field("start_s", pa.float64()),  # null: the beginning
        pa.field("end_s", pa.float64()),  # null: the end
        pa.field("prompts", pa.list_(PROMPT), nullable=False),
        pa.field("attempts", pa.int32(), nullable=False),  # attempts in earlier runs
        # Results of the probe, null if it found none. Plans and estimates use them, decoding does not.
        pa.field("duration_s", pa.float64()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("fps", pa.float64()),
        pa.field("codec", pa.string()),
        pa.field("probe_error", pa.string()),
    ]
)

ANSWER = pa.struct(
    [
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("text", pa.string()),
        ("status", pa.string()),  # ok | truncated
        ("prompt_tokens", pa.int32()),
        ("output_tokens", pa.int32()),
    ]
)

ROW_SCHEMA = pa.schema(
    [
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),  # the video, or the first image
        pa.field("uris", pa.list_(pa.string()), nullable=False),
        pa.field("etag", pa.string()),
        pa.field("size_bytes", pa.int64()),
        pa.field("start_s", pa.float64()),
        pa.field("end_s", pa.float64()),
        pa.field("frame_times_s", pa.list_(pa.float64())),
        pa.field("status", pa.string(), nullable=False),  # ok | truncated | skipped | error
        pa.field("error_stage", pa.string()),
        pa.field("error_type", pa.string()),
        pa.field("error_message", pa.string()),
        pa.field("attempts", pa.int32(), nullable=False),
        pa.field("text", pa.string()),  # the answer to the first prompt
        pa.field("answers", pa.list_(ANSWER)),
        pa.field("model", pa.string(), nullable=False),
        pa.field("model_revision", pa.string()),
        pa.field("lightkv", pa.string()),  # the compression settings as JSON; null: disabled
        pa.field("vision_tokens", pa.int64()),  # before compression
        pa.field("kept_tokens", pa.int64()),  # in the last layers
        pa.field("retention", pa.float64()),  # layer-averaged share of vision KV entries kept
        # At the end of prefill, of the first prompt: the cache of its batch divided by its prompts, padding included.
        pa.field("kv_bytes", pa.int64()),
        pa.field("kv_bytes_uncompressed", pa.int64()),  # the same without compression
        pa.field("decode_s", pa.float64()),  # time that the decoders worked
        pa.field("wait_s", pa.float64()),  # time that the model waited for frames
        pa.field("queue_s", pa.float64()),  # the part of wait_s until the decoder had a CPU and a process
        pa.field("encode_s", pa.float64()),
        pa.field("prefill_s", pa.float64()),
        pa.field("generate_s", pa.float64()),
        pa.field("started_at", pa.timestamp("us", "UTC")),  # when the model actor started the unit, by its own clock
        pa.field("finished_at", pa.timestamp("us", "UTC")),
        pa.field("actor", pa.string()),  # id of the model actor; stays the same when its process is replaced
        pa.field("peak_memory_bytes", pa.int64()),
        pa.field("code_version", pa.string(), nullable=False),
        pa.field("config_hash", pa.string(), nullable=False),
    ]
)


def unit_id(
    uris: Sequence[str],
    start_s: float | None,
    end_s: float | None,
    prompts: Sequence[dict[str, str]],
) -> str:
    """A unit's id: a 128-bit hash of its uris, window and prompts, the same on every machine."""
    content = json.dumps(
        [list(uris), start_s, end_s, [[p["prompt_id"], p["prompt"]] for p in prompts]], ensure_ascii=False
    )
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def units_table(units: Sequence[dict[str, Any]]) -> pa.Table:
    """Units as a table of `UNIT_SCHEMA`; missing keys are null."""
    return pa.Table.from_pylist(list(units), schema=UNIT_SCHEMA)


def rows_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Rows as a table of `ROW_SCHEMA`; missing keys are null."""
    return pa.Table.from_pylist(list(rows), schema=ROW_SCHEMA)
