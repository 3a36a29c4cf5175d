"""The two tables of a run: units (what is to be done) and rows (what came of it). One unit gives one row."""

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
        pa.field("uris", pa.list_(pa.string()), nullable=False),  # one for a video, 1..n for an image set
        pa.field("etag", pa.string()),  # of the first object, as the storage gives it
        pa.field("size_bytes", pa.int64()),  # of all objects
        pa.field("start_s", pa.float64()),  # null: from the beginning
        pa.field("end_s", pa.float64()),  # null: to the end
        pa.field("prompts", pa.list_(PROMPT), nullable=False),
        pa.field("attempts", pa.int32(), nullable=False),  # made in earlier runs of this unit
        # What the probe saw; null where it saw nothing. Plans and estimates use it, decoding does not.
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
        pa.field("lightkv", pa.string()),  # method, stages and the rest as JSON; null: switched off
        pa.field("vision_tokens", pa.int64()),  # before compression
        pa.field("kept_tokens", pa.int64()),  # in the last layers
        pa.field("retention", pa.float64()),  # layer-averaged share of vision KV entries kept
        # At the end of prefill: the cache of the first prompt's batch by prompts, padding to the longest included.
        pa.field("kv_bytes", pa.int64()),
        pa.field("kv_bytes_uncompressed", pa.int64()),  # likewise
        pa.field("decode_s", pa.float64()),  # time the decoders worked
        pa.field("wait_s", pa.float64()),  # time the model waited for frames
        pa.field("queue_s", pa.float64()),  # of wait_s: until the decoder had a CPU and a process
        pa.field("encode_s", pa.float64()),
        pa.field("prefill_s", pa.float64()),
        pa.field("generate_s", pa.float64()),
        pa.field("started_at", pa.timestamp("us", "UTC")),  # the model actor took the unit up; its own clock
        pa.field("finished_at", pa.timestamp("us", "UTC")),
        pa.field("actor", pa.string()),  # id of the model actor, which it keeps when its process is replaced
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
    """A unit's id: 128 bits over what is asked about what. The same plan gives the same ids on any machine."""
    content = json.dumps(
        [list(uris), start_s, end_s, [[p["prompt_id"], p["prompt"]] for p in prompts]], ensure_ascii=False
    )
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def units_table(units: Sequence[dict[str, Any]]) -> pa.Table:
    """Units as a table of `UNIT_SCHEMA`; keys a unit lacks are null."""
    return pa.Table.from_pylist(list(units), schema=UNIT_SCHEMA)


def rows_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Rows as a table of `ROW_SCHEMA`; keys a row lacks are null."""
    return pa.Table.from_pylist(list(rows), schema=ROW_SCHEMA)
