"""Train, export and measure the mini model, on one GPU or a few CPU processes; needs neither Ray nor storage.

    python -m jobs.train_mini --out DIR --minutes 60 --procs 2 --export WEIGHTS   # train or resume, then export
    python -m jobs.train_mini --out DIR --minutes 0 --export WEIGHTS              # export the last checkpoint
    python -m jobs.train_mini --measure WEIGHTS --split test --json RESULT        # exact match per task
    python -m jobs.train_mini --card WEIGHTS --json RESULT                        # write its tables into the card

Weights are the exponential moving average in bf16, as a Hugging Face folder.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline.mini.card import write_accuracy
from pipeline.mini.measure import CARD, measure
from pipeline.mini.model import export
from pipeline.mini.train import TrainConfig, Trainer


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
    """Train in `config.procs` processes to the end of the schedule; more than one only on CPUs."""
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
    parser.add_argument("--json", type=Path, help="with --measure: file to write; with --card: file to read")
    parser.add_argument("--card", type=Path, help="weights folder; writes the tables of --json into its README.md")
    args = parser.parse_args(arguments)
    if args.measure:
        text = json.dumps(measure(args.measure, args.split, CARD), indent=1)
        if args.json:
            args.json.write_text(text + "\n", encoding="utf-8")
    if args.card:
        if args.json is None:
            parser.error("--card needs the result of a measurement: pass --json")
        write_accuracy(args.card / "README.md", json.loads(args.json.read_text(encoding="utf-8")))
    if args.measure or args.card:
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
