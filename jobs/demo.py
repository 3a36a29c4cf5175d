"""Render sample videos, caption them on a local Ray with the embedded model, and compare with the truth.

One of the files is no video, as in every real bucket: it becomes an error row.
"""

import argparse
import json
from pathlib import Path

from jobs.cli import main_guard
from pipeline.config import load_config
from pipeline.job import caption
from pipeline.mini.world import render_demo
from pipeline.run import Work

CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"


def main() -> int:
    """Render, caption, compare; 0 when every file has its row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("demo-out"), help="default: demo-out")
    parser.add_argument("--videos", metavar="N", type=int, default=12, help="default: 12")
    arguments = parser.parse_args()
    videos = arguments.out / "videos"
    truth = render_demo(videos, arguments.videos)
    (videos / "broken.mp4").write_text("this is no video\n")
    job = load_config(CONFIG, [f"source.uri={videos}", f"sink.uri={arguments.out / 'rows'}"])
    print_captions(caption(job), truth)
    return 0


def print_captions(work: Work, truth: Path) -> None:
    """Every file's caption beside what the renderer put into it."""
    known = {row["file"]: row["caption"] for row in map(json.loads, truth.read_text().splitlines())}
    rows = work.rows(["uri", "status", "text", "error_type", "error_message"]).sort_by("uri").to_pylist()
    for row in rows:
        name = Path(row["uri"]).name
        if row["status"] == "error":
            print(f"\n{name}  error: {row['error_type']}: {row['error_message']}")
        else:
            print(f"\n{name}  {row['text']}\n{'truth':>{len(name)}}  {known[name]}")
    right = sum(_words(row["text"]) == _words(known.get(Path(row["uri"]).name, "")) for row in rows if row["text"])
    print(f"\n{right} of {len(known)} captions are word for word what was rendered")


def _words(text: str) -> list[str]:
    return text.replace(".", " . ").split()


if __name__ == "__main__":
    main_guard(main)
