"""Train, export and measure the mini model; needs neither Ray nor storage, one GPU or a few CPU processes are enough.

    python -m jobs.train_mini --out DIR --minutes 60 --procs 2 --export WEIGHTS   # train or resume, then export
    python -m jobs.train_mini --out DIR --minutes 0 --export WEIGHTS              # export the last checkpoint
    python -m jobs.train_mini --measure WEIGHTS --split test                      # exact match per task

Weights are the exponential moving average in bf16, as a Hugging Face folder.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import AutoModelForImageTextToText, AutoTokenizer

from pipeline.mini.accuracy import as_table, exact_match
from pipeline.mini.coded import coded_exact_match
from pipeline.mini.data import Task
from pipeline.mini.model import export
from pipeline.mini.train import TrainConfig, Trainer
from pipeline.mini.world import DemoStyle

CODED = {
    "96×96, up to 3 objects": DemoStyle(),
    "128×128, up to 4 objects, signs": DemoStyle(128, 128, max_things=4, sign_share=0.4),
}
MEASURED = {
    "images 96×96, up to 3 objects": ((Task("image", 1, 96, 96, 50, 3), 6),),
    "images 128×128, up to 4 objects": ((Task("image", 1, 128, 128, 50, 4), 4),),
    "videos 96×96, 8 frames, up to 3 objects": ((Task("video", 4, 96, 96, 25, 3), 12),),
    "videos 96×96, 16 frames, up to 3 objects": ((Task("video", 8, 96, 96, 20, 3), 10),),
    "videos 128×128, 16 frames, up to 4 objects": ((Task("video", 8, 128, 128, 10, 4), 15),),
    "videos 128×160, 16 frames, up to 4 objects": ((Task("video", 8, 128, 160, 10, 4), 6),),
    "videos 192×192, 8 frames, up to 4 objects": ((Task("video", 4, 192, 192, 10, 4), 6),),
    "sets of 3 images 96×96, up to 2 objects each": ((Task("set", 3, 96, 96, 20, 2), 8),),
}


def _worker(rank: int, config: TrainConfig, rendezvous: str) -> None:
    if config.procs > 1:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=config.procs)
    trainer = Trainer(config, rank)
    resumed = trainer.resume()
    if rank == 0:
        print(f"{'resuming at' if resumed else 'starting from'} step {trainer.step}", flush=True)
    trainer.run()
    if config.procs > 1:
        dist.destroy_process_group()


def train(config: TrainConfig) -> None:
    """Run `config.procs` processes to the end of the schedule; more than one is for CPUs."""
    if config.procs > 1 and config.device != "cpu":
        raise ValueError(f"expected one process on {config.device}, got procs={config.procs}; pass --procs 1")
    config.out.mkdir(parents=True, exist_ok=True)
    if config.procs == 1:
        _worker(0, config, "")
        return
    meeting = config.out.resolve() / f"rendezvous-{os.getpid()}"
    try:
        mp.spawn(_worker, args=(config, f"file://{meeting}"), nprocs=config.procs)
    finally:
        meeting.unlink(missing_ok=True)


def measure(weights: Path, split: str, videos: int) -> None:
    """Print a Markdown table of exact match per task; `videos` H.264 demo videos are answered by `generate` as well."""
    tokenizer = AutoTokenizer.from_pretrained(weights)
    model = AutoModelForImageTextToText.from_pretrained(weights, dtype=torch.float32).eval()
    for title, tasks in MEASURED.items():
        print(as_table(f"{title}, {split} seeds", exact_match(model, tokenizer, split, tasks)), flush=True)
    if videos:
        for title, style in CODED.items():
            scores = coded_exact_match(model, tokenizer, videos, 1, style)
            print(as_table(f"{videos} H.264 demo videos, {title}, generate()", scores), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="checkpoint folder; an interrupted run resumes from it")
    parser.add_argument("--minutes", type=float, default=60, help="wall-clock training time over all runs")
    parser.add_argument("--procs", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export", type=Path, help="folder to write the weights to")
    parser.add_argument("--measure", type=Path, help="weights folder to measure; nothing is trained")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--videos", type=int, default=60, help="with --measure: H.264 videos to answer")
    args = parser.parse_args(arguments)
    if args.measure:
        measure(args.measure, args.split, args.videos)
        return
    if args.out is None:
        parser.error("--out is needed to train or export: pass the checkpoint folder")
    config = TrainConfig(args.out, args.minutes, args.procs, args.device, args.seed)
    if args.minutes > 0:
        train(config)
    if args.export:
        trainer = Trainer(config)
        if not trainer.resume():
            parser.error(f"expected a checkpoint in {args.out}, found none: train first (--minutes)")
        export(trainer.ema, args.export)


if __name__ == "__main__":
    main()
