"""Render sample videos, then caption and question them on a local Ray, with LightKV and without it.

Every video has its own questions, whose answers are known from the rendering. One of the files is not a video, as in
real buckets: it becomes an error row.
"""

import argparse
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jobs.cli import main_guard
from jobs.exact_match import words
from pipeline.config import load_config
from pipeline.job import caption
from pipeline.mini.data import VIDEO_FAMILIES
from pipeline.mini.world import render_demo
from pipeline.run.summary import format_bytes
from pipeline.version import code_version

CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"
RUNS = {"LightKV": "lightkv.enabled=true", "plain": "lightkv.enabled=false"}
ASKED = ("caption", *VIDEO_FAMILIES)  # what the embedded model was trained on


def main() -> int:
    """Render, run twice and compare; return 0 when every file has its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("demo-out"), help="default: demo-out")
    parser.add_argument("--videos", metavar="N", type=int, default=12, help="default: 12")
    arguments = parser.parse_args()
    if arguments.videos < 1:
        parser.error(f"--videos: expected at least 1, got {arguments.videos}")
    truth = prepare(arguments.out / "videos", arguments.videos)
    rows = {name: answered(arguments.out, name, switch) for name, switch in RUNS.items()}
    result = compare(truth, rows)
    (arguments.out / "accuracy.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(report(truth, rows, result))
    return 0


def prepare(folder: Path, videos: int) -> dict[str, dict[str, str]]:
    """Write the videos, one broken file and their manifest; returns the right answers: file → task → answer."""
    known = [json.loads(line) for line in render_demo(folder, videos).read_text(encoding="utf-8").splitlines()]
    (folder / "broken.mp4").write_text("this is no video\n")
    questions = {row["file"]: [qa for qa in row["answers"] if qa["family"] in ASKED] for row in known}
    with (folder / "manifest.jsonl").open("w", encoding="utf-8") as lines:
        for file, asked in {"broken.mp4": known[0]["answers"][:1], **questions}.items():
            prompts = [{"prompt_id": qa["family"], "prompt": qa["question"]} for qa in asked]
            lines.write(json.dumps({"uri": file, "prompts": prompts}) + "\n")
    return {file: {qa["family"]: qa["answer"] for qa in asked} for file, asked in questions.items()}


def answered(out: Path, name: str, switch: str) -> list[dict[str, Any]]:
    """Run over the manifest and return the rows, sorted by file; replaces the run of an earlier demo."""
    print(f"\n{name}: {switch}", flush=True)
    sink = out / "rows" / name.lower()
    if (sink / "_run" / "run.json").exists():
        shutil.rmtree(sink)
    job = load_config(CONFIG, [f"source.uri={out / 'videos' / 'manifest.jsonl'}", f"sink.uri={sink}", switch])
    rows: list[dict[str, Any]] = caption(job).rows().sort_by("uri").to_pylist()
    return rows


def compare(truth: dict[str, dict[str, str]], rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Right answers per task and run, number of answers that agree word for word, and KV bytes of both runs."""
    told = {name: _answers(of_run) for name, of_run in rows.items()}
    every = [(file, task, answer) for file, answers in truth.items() for task, answer in answers.items()]
    tasks = {
        task: {"asked": sum(t == task for _, t, _ in every)}
        | {
            name: sum(t == task and words(answers.get((file, t))) == words(answer) for file, t, answer in every)
            for name, answers in told.items()
        }
        for task in ASKED
        if any(t == task for _, t, _ in every)
    }
    first, second = told.values()
    return {
        "code_version": code_version(),
        "videos": len(truth),
        "tasks": tasks,
        "agree": sum(words(first.get(key)) == words(second.get(key)) for key in ((f, t) for f, t, _ in every)),
        "kv_bytes": {name: sum(row["kv_bytes"] or 0 for row in of_run) for name, of_run in rows.items()},
    }


def report(truth: dict[str, dict[str, str]], rows: dict[str, list[dict[str, Any]]], result: dict[str, Any]) -> str:
    """Every caption with the rendered truth, the table of tasks, and a summary sentence."""
    lines = []
    for row in rows["LightKV"]:
        file = Path(row["uri"]).name
        if row["status"] in ("ok", "truncated"):
            lines += [f"\n{file}  {row['text']}", f"{'truth':>{len(file)}}  {truth[file]['caption']}"]
        else:
            lines.append(f"\n{file}  {row['status']}: {row['error_type']}: {row['error_message']}")
    tasks = result["tasks"]
    total = {key: sum(task[key] for task in tasks.values()) for key in ("plain", "LightKV", "asked")}
    lines.append(f"\n{'task':<14}  right plain  right LightKV   of")
    for task, counts in {**tasks, "together": total}.items():
        lines.append(f"{task:<14}  {counts['plain']:11}  {counts['LightKV']:13}  {counts['asked']:3}")
    lines.append(
        f"\n{result['agree']} of {total['asked']} answers are word for word the same with and without LightKV\n"
    )
    return "\n".join([*lines, _in_one_sentence(tasks["caption"], total, result["kv_bytes"])])


def _in_one_sentence(captions: dict[str, int], total: dict[str, int], kv: dict[str, int]) -> str:
    if not kv["plain"]:
        return "No video was answered: the rows above say why."
    share, of = kv["LightKV"] / kv["plain"], f"{format_bytes(kv['LightKV'])} of {format_bytes(kv['plain'])}"
    short = {key: total[key] - captions[key] for key in total}
    return (
        f"With {100 * share:.0f} % of the KV cache ({of}), LightKV gave {captions['LightKV']} of {captions['asked']} "
        f"captions and {short['LightKV']} of {short['asked']} short answers right; without it {captions['plain']} and "
        f"{short['plain']}."
    )


def _answers(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str], str]:
    """(file, task) → answer."""
    return {
        (Path(row["uri"]).name, answer["prompt_id"]): answer["text"] for row in rows for answer in row["answers"] or ()
    }


if __name__ == "__main__":
    main_guard(main)
