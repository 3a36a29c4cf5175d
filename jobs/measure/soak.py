"""Kill a job's processes at random for a given time, then check that no row was lost, doubled or mixed up.

Renders videos and asks the model about them without kills. Then runs `jobs.caption` in rounds over manifests of these
videos on a local Ray, and kills the driver, the model's process, decoders, the counter of attempts and Ray itself, or
asks them to end. Restarts a driver that ended with the same command. When the time is up, lets the last round finish
and retries error rows. Every unit must have exactly one row, with the answer for its own video.
"""

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

SETTINGS = [
    "frames.fps=2",
    "frames.max_frames=8",
    "frames.max_px=9216",
    "frames.batch_frames=1",  # so that a video is eight batches
    "model.max_new_tokens=24",
    "sink.rows_per_file=4",
    "ray.actors.batch_units=4",
    "ray.num_cpus=2",
    "ray.object_store_bytes=200000000",
]
DRIVER, ASKED = "driver", "driver asked to end"
# Processes below the driver, found by a part of their command, or of the title that Ray sets while they work.
TITLES = {
    "model": "CaptionActor",
    "decoder": "ray::decode_",
    "counter": "ray::Attempts",
    "read counter": "ray::ReadCounts",
    "raylet": "raylet/raylet ",
}
# How often each victim is killed in every fourteen kills.
VICTIMS = {"model": 4, "decoder": 4, "counter": 1, "read counter": 1, "raylet": 1, DRIVER: 2, ASKED: 1}
_PAUSE_S = (1.0, 15.0)
_WAIT_S = 60.0  # to wait for a victim: a decoder works for moments only, a model exists after its start
_STARTS_PER_ROUND = 200  # a job that makes no progress has failed
_PROMPTS = ("describe the video .", "how many objects are there ?")
_ENDS_S = (None, 1.0)  # whole videos, and their first second: short units among long ones
Asked = tuple[str, str, float | None]  # video, prompt, end


class Chance:
    """Draws the pauses and the victims; a shuffled list of all victims is used up before the next one starts."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._turns: list[str] = []

    def pause_s(self) -> float:
        return self._random.uniform(*_PAUSE_S)

    def victim(self) -> str:
        """The next victim; the same until `hit` is called."""
        if not self._turns:
            self._turns = self._random.sample(list(VICTIMS), sum(VICTIMS.values()), counts=list(VICTIMS.values()))
        return self._turns[-1]

    def hit(self) -> str:
        """Remove and return the next victim: it was killed."""
        return self._turns.pop()


@dataclass
class Tally:
    """Counts of a soak: kills by victim, starts of the driver, and ids of units with wrong rows."""

    kills: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    starts: int = 0
    units: int = 0
    repeated_errors: int = 0
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.lost or self.doubled or self.foreign)


def main() -> int:
    """Soak for `--minutes`; return 0 if every unit of every round has exactly one row, its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--units", metavar="N", type=int, default=120, help="units of a round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--json", metavar="FILE", type=Path, help="also write the result to this file: jobs/results/soak.json"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        tally = soak(Path(name), arguments.minutes * 60, arguments.units, arguments.seed)
    result = {
        "command": f"python -m jobs.measure.soak --minutes {arguments.minutes:g}",
        "machine": f"{len(os.sched_getaffinity(0))} CPUs, {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in ("ray", "torch", "decord")},
        "minutes": arguments.minutes,
    } | report(tally)
    print(json.dumps(result, indent=2))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if tally.clean else 1


def soak(folder: Path, seconds: float, units: int, seed: int) -> Tally:
    """Run rounds until the time is up."""
    chance, tally = Chance(seed), Tally()
    answers = undisturbed(folder / "videos")
    until = time.monotonic() + seconds
    while tally.rounds == 0 or time.monotonic() < until:
        out = folder / f"round-{tally.rounds}"
        expected = write_manifest(folder / f"round-{tally.rounds}.jsonl", answers, units)
        options = [f"source.uri={folder}/round-{tally.rounds}.jsonl", f"sink.uri={out}"]
        _disturbed("caption", options, until, chance, tally)
        if "error" in pq.read_table(out, columns=["status"])["status"].to_pylist():
            tally.repeated_errors += 1
            _disturbed("retry", options, 0.0, chance, tally)
        judge(pq.read_table(out, columns=["id", "text"]).to_pylist(), expected, tally)
        tally.rounds += 1
        print(f"round {tally.rounds}: {sum(tally.kills.values())} kills so far, clean: {tally.clean}", flush=True)
    return tally


def undisturbed(videos: Path) -> dict[Asked, str]:
    """Answer every question with a captioner in this process: question → answer."""
    from pipeline.captioning.captioner import Captioner
    from pipeline.config import load_config
    from pipeline.decoding.decode import decode_unit
    from pipeline.mini.world import render_demo

    videos.mkdir(parents=True)
    render_demo(videos, 8)
    job = load_config(None, [*SETTINGS, f"source.uri={videos}", f"sink.uri={videos}"])
    captioner = Captioner(job, "soak")
    prompts = [{"prompt_id": str(number), "prompt": prompt} for number, prompt in enumerate(_PROMPTS)]
    answers = {}
    for path, end_s in product(sorted(videos.glob("*.mp4")), _ENDS_S):
        unit: dict[str, Any] = dict.fromkeys(("etag", "size_bytes", "start_s"))
        unit |= {"id": path.name, "kind": "video", "uris": [str(path)], "attempts": 0, "prompts": prompts}
        unit |= {"end_s": end_s}
        frames = decode_unit(unit, frames=job.frames, decode=job.decode, storage=job.storage, sizing=captioner.sizing)
        for answer in captioner.row(unit, frames)["answers"]:
            answers[str(path), answer["prompt"], end_s] = answer["text"]
    return answers


def write_manifest(path: Path, answers: dict[Asked, str], units: int) -> dict[str, str]:
    """Write a manifest of `units` units over the videos and prompts; returns id → right answer."""
    asked, expected = list(answers), {}
    with path.open("w") as lines:
        for number in range(units):
            uri, prompt, end_s = asked[number % len(asked)]
            expected[f"unit-{number:05d}"] = answers[uri, prompt, end_s]
            unit = {"id": f"unit-{number:05d}", "uri": uri, "prompt": prompt, "end_s": end_s}
            lines.write(json.dumps(unit) + "\n")
    return expected


def judge(rows: Sequence[dict[str, Any]], expected: dict[str, str], tally: Tally) -> None:
    """Add to `tally` the units without a row, with several rows, and with the text of another unit."""
    times = Counter(row["id"] for row in rows)
    tally.units += len(expected)
    tally.lost += sorted(set(expected) - set(times))
    tally.doubled += sorted(id_ for id_, count in times.items() if count > 1)
    tally.foreign += sorted({row["id"] for row in rows if row["text"] != expected.get(row["id"])})


def report(tally: Tally) -> dict[str, Any]:
    """The result as printed: counts, and the first few ids of wrong units."""
    return {
        "rounds": tally.rounds,
        "units": tally.units,
        "driver_starts": tally.starts,
        "kills": {victim: tally.kills[victim] for victim in VICTIMS},
        "rounds_with_error_rows_retried": tally.repeated_errors,
        **{
            name: {"units": len(ids), "first": ids[:5]}
            for name, ids in (("lost", tally.lost), ("doubled", tally.doubled), ("foreign", tally.foreign))
        },
    }


def processes(driver: int, title: str) -> list[psutil.Process]:
    """The processes below a driver whose title or command contains `title`."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        try:
            if title in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:  # it ended this moment
            continue
    return found


def _disturbed(job: str, options: Iterable[str], until: float, chance: Chance, tally: Tally) -> None:
    """Start the job again until it has all rows; kill its processes until the time `until`."""
    for _ in range(_STARTS_PER_ROUND):
        tally.starts += 1
        ends = {0, 2, -signal.SIGKILL, -signal.SIGTERM}  # SIGTERM: asked to end before its handler was installed
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(_command(job, options), env=_environment(), stdout=errors, stderr=errors)
            while process.poll() is None:
                pause_s = chance.pause_s()
                if time.monotonic() + pause_s > until:
                    process.wait()
                    break
                try:
                    process.wait(pause_s)
                except subprocess.TimeoutExpired:
                    if strike(process, chance.victim()):
                        victim = chance.hit()
                        tally.kills[victim] += 1
                        ends |= {1} if victim == "raylet" else set()  # Ray ends a driver whose raylet is gone
            errors.seek(0)
            text = errors.read()
        if process.returncode == 0 and "was asked to end" not in text:
            return
        if process.returncode not in ends:
            raise RuntimeError(f"the job ended with exit code {process.returncode}:\n{text[-4000:]}")
    raise RuntimeError(f"the job did not finish in {_STARTS_PER_ROUND} starts:\n{text[-4000:]}")


def strike(driver: subprocess.Popen[bytes], victim: str, wait_s: float = _WAIT_S) -> bool:
    """Kill a process of the kind `victim` as soon as one exists; False if none appeared before the driver ended."""
    if victim == DRIVER:
        driver.kill()
        return True
    if victim == ASKED:
        driver.terminate()
        return True
    deadline = time.monotonic() + wait_s
    while driver.poll() is None and time.monotonic() < deadline:
        try:
            for process in processes(driver.pid, TITLES[victim])[:1]:
                process.kill()
                return True
        except psutil.Error:  # it ended this moment
            pass
        time.sleep(0.01)
    return False


def _command(job: str, options: Iterable[str]) -> list[str]:
    return [sys.executable, "-m", f"jobs.{job}", *(f"--set={option}" for option in [*SETTINGS, *options])]


def _environment() -> dict[str, str]:
    return os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}


if __name__ == "__main__":
    sys.exit(main())
