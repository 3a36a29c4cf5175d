"""Show what a captioning job would do, without doing it: units, hours, frames, tokens, KV cache.

Lists and probes the source and reads the model's configuration. Needs no weights, GPU or Ray; writes nothing.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from jobs.cli import load, main_guard, parser
from pipeline.config import JobConfig
from pipeline.errors import ConfigError
from pipeline.run.summary import format_bytes

if TYPE_CHECKING:
    from pipeline.planning.estimate import PlanSummary, Totals

_SHOWN_ERRORS = 10
_PLAIN = "  uncompressed"


def main() -> int:
    """Print the plan; return 0. Raises if the configuration or the source is refused."""
    cli = parser(
        __doc__ or "",
        epilog="""examples:
  python -m jobs.plan --config configs/caption.yaml --set source.uri=s3://bucket/videos --set sink.uri=out
  python -m jobs.plan --config configs/caption.yaml --set clips.length_s=60 --json | jq .total.vision_tokens""",
    )
    cli.add_argument("--json", action="store_true", help="print the plan as JSON")
    arguments = cli.parse_args()
    config = load(arguments)
    summary, note = summarise(config)
    print(json.dumps(asdict(summary) | {"note": note}, indent=2) if arguments.json else text(summary, config))
    if note:
        print(f"note: {note}", file=sys.stderr)
    return 0


def summarise(config: JobConfig) -> "tuple[PlanSummary, str | None]":
    """The plan's estimate, and why it has no token counts, if it has none."""
    from pipeline.captioning.captioner import (
        lightkv_config,  # importing torch takes seconds, which help and refusals must not
    )
    from pipeline.captioning.context import ContextLimit
    from pipeline.captioning.encode import encoder_for
    from pipeline.captioning.models import describe
    from pipeline.planning.estimate import estimate_plan
    from pipeline.planning.plan import plan_units

    table = plan_units(config)
    try:
        card = describe(config.model)
        encoder = encoder_for(card.config, card.preprocessor)
        encoder.sizing(config.frames)
        compression = lightkv_config(config, card.config)
    except ConfigError as error:
        return estimate_plan(table, config), f"tokens are not estimated: {error}"
    context = ContextLimit(card.config, encoder, config.model.max_new_tokens)
    summary = estimate_plan(
        table,
        config,
        model_config=card.config,
        encoder=encoder,
        compression=compression,
        refusal=context.refusal,
    )
    return summary, None


def text(summary: "PlanSummary", config: JobConfig) -> str:
    """The plan as a table: one column per kind of unit, and the sum of several."""
    columns = dict(sorted(summary.by_kind.items()))
    if len(columns) != 1:
        columns["total"] = summary.total
    rows = [("", list(columns))]
    rows += [(name, [show(one) for one in columns.values()]) for name, show in _rows(summary, config)]
    widths = [max(len(name) for name, _ in rows)]
    widths += [max(len(values[i]) for _, values in rows) for i in range(len(columns))]
    lines = [
        "  ".join([name.ljust(widths[0]), *(v.rjust(w) for v, w in zip(values, widths[1:], strict=True))])
        for name, values in rows
    ]
    if summary.ignored_files:
        lines.append(f"{summary.ignored_files:,} other files in the source are left out")
    if summary.repeated_rows:
        lines.append(f"{summary.repeated_rows:,} manifest rows repeat another one and are planned once")
    if config.source.known:
        lines.append(f"{summary.known_units:,} units have their row under {config.source.known} and are left out")
    lines += _shown("likely to fail", list(summary.probe_errors.values()))
    lines += _shown("will be refused", [f"unit {unit}: {why}" for unit, why in summary.refusals.items()])
    return "\n".join(lines)


def _shown(what: str, errors: list[str]) -> list[str]:
    more = len(errors) - _SHOWN_ERRORS
    return [f"{what}: {error}" for error in errors[:_SHOWN_ERRORS]] + ([f"… and {more:,} more"] if more > 0 else [])


def _rows(summary: "PlanSummary", config: JobConfig) -> "list[tuple[str, Callable[[Totals], str]]]":
    rows: list[tuple[str, Callable[[Totals], str]]] = [
        ("units", lambda t: f"{t.units:,}"),
        ("files", lambda t: f"{t.videos:,}"),
        ("size", lambda t: format_bytes(t.bytes)),
        ("not probed", lambda t: f"{t.unprobed:,}"),
        *([("too long for the model", lambda t: f"{t.too_long:,}")] if summary.total.too_long else []),
        ("hours of video", lambda t: f"{t.hours:,.2f}"),
        ("frames", lambda t: f"{t.frames:,}"),
    ]
    if not summary.total.text_tokens:
        return rows
    share = f" at retention {config.lightkv.retention:g}" if config.lightkv.enabled else ", compression off"
    rows += [
        ("vision tokens", lambda t: f"{t.vision_tokens:,}"),
        ("text tokens, about", lambda t: f"{t.text_tokens:,}"),
        (f"KV cache per unit{share}", lambda t: format_bytes(t.kv_bytes / max(1, t.units - t.unprobed))),
        (_PLAIN, lambda t: format_bytes(t.kv_bytes_uncompressed / max(1, t.units - t.unprobed))),
        ("KV cache of the largest", lambda t: format_bytes(t.largest_kv_bytes)),
        (_PLAIN, lambda t: format_bytes(t.largest_kv_bytes_uncompressed)),
        ("prefill TFLOP", lambda t: f"{t.flops / 1e12:,.3g}"),
        (_PLAIN, lambda t: f"{t.flops_uncompressed / 1e12:,.3g}"),
    ]
    return rows if config.lightkv.enabled else [row for row in rows if row[0] != _PLAIN]


if __name__ == "__main__":
    main_guard(main)
