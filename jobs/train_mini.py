"""Train, export and measure the mini model.

    python -m jobs.train_mini --out DIR --minutes 60 --procs 2           # train, or resume what DIR holds
    python -m jobs.train_mini --out DIR --minutes 60 --export WEIGHTS    # write the EMA weights as a Hugging Face folder
    python -m jobs.train_mini --measure WEIGHTS --split test             # exact match per task
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline.mini.model import export
from pipeline.mini.train import TrainConfig, Trainer


def _worker(rank: int, config: TrainConfig, rendezvous: str) -> None:
    if config.device == "cpu" and config.procs > 1:
        torch.set_num_threads(1)
    if config.procs > 1:
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=config.procs)
    trainer = Trainer(config, rank)
    resumed = trainer.resume()
    if rank == 0:
        print(f"{'resuming at' if resumed else 'starting from'} step {trainer.step}", flush=True)
    trainer.run()
    if config.procs > 1:
        dist.destroy_process_group()


def train(config: TrainConfig) -> None:
    """Run `config.procs` processes to the end of the schedule."""
    config.out.mkdir(parents=True, exist_ok=True)
    if config.procs == 1:
        _worker(0, config, "")
        return
    meeting = config.out.resolve() / f"rendezvous-{os.getpid()}"
    try:
        mp.spawn(_worker, args=(config, f"file://{meeting}"), nprocs=config.procs)
    finally:
        meeting.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--procs", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export", type=Path)
    args = parser.parse_args()
    config = TrainConfig(args.out, args.minutes, args.procs, args.device, args.seed)
    train(config)
    if args.export:
        trainer = Trainer(config)
        trainer.resume()
        export(trainer.ema, args.export)


if __name__ == "__main__":
    main()
