"""Trains the mini model: Muon and AdamW, auxiliary losses on vision tokens, EMA, a resumable wall-clock schedule.

Each process renders its own scenes; gradients are averaged with gloo. Processes share only a folder.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from pipeline.mini.accuracy import as_line, exact_match
from pipeline.mini.batched import encode_vision, forward, logits
from pipeline.mini.data import DENSE_CLASSES, Batch, Task, build_batch, curriculum
from pipeline.mini.model import build_model, tokenizer
from pipeline.mini.muon import Muon

VISION_LABELS = ("shape", "color", "size", "char_left", "char_right", "motion")  # predicted from the encoder's tokens
MIDDLE_LABELS = ("shape", "color", "motion", "row", "column", "time")  # predicted halfway through the text model
DIGIT_WEIGHT = 3.0  # digits take longest to learn, and few tokens need them
EMPTY_CELL_WEIGHT = 0.1  # most tokens show only background
VALIDATION = (
    (Task("image", 1, 96, 96, 32, 4), 1),
    (Task("video", 4, 96, 96, 24, 4), 2),
    (Task("video", 8, 128, 128, 8, 4), 2),
)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run. `minutes` is wall-clock time over all resumed runs; the schedule ends with it.

    `dense_weight` is the initial weight of the auxiliary losses; it decays nearly to 0.
    """

    out: Path
    minutes: float
    procs: int = 1
    device: str = "cpu"
    seed: int = 0
    token_budget: int = 2200
    muon_lr: float = 4e-3
    adam_lr: float = 2e-3
    warmup: float = 0.01
    ema_decay: float = 0.997
    dense_weight: float = 2.0
    save_minutes: float = 3.0
    validate_minutes: float = 8.0
    max_steps: int | None = None
    validation: tuple[tuple[Task, int], ...] = VALIDATION


class DenseHeads(nn.Module):
    """Linear classifiers on vision tokens, used only during training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vision = nn.ModuleDict({name: nn.Linear(width, DENSE_CLASSES[name]) for name in VISION_LABELS})
        self.middle = nn.ModuleDict({name: nn.Linear(width, DENSE_CLASSES[name]) for name in MIDDLE_LABELS})

    def loss(self, vision: Tensor, middle: Tensor | None, labels: dict[str, Tensor]) -> Tensor:
        """Mean cross-entropy over labels; vision and middle tokens [B, tokens, D], labels [B, tokens] each."""
        total = vision.new_zeros(())
        for heads, tokens in ((self.vision, vision), (self.middle, middle)):
            for name, head in heads.items() if tokens is not None else ():
                scores, wanted = head(tokens).flatten(0, 1), labels[name].flatten()
                weight = torch.ones(scores.shape[1], device=scores.device)
                if name not in ("row", "column", "time"):
                    weight[0] = EMPTY_CELL_WEIGHT
                total = total + F.cross_entropy(scores, wanted, weight=weight)
        return total / (len(VISION_LABELS) + len(MIDDLE_LABELS))


class Trainer:
    """One process's model, optimisers and progress in the schedule; `rank` 0 writes checkpoints and the log."""

    def __init__(self, config: TrainConfig, rank: int = 0) -> None:
        self.config, self.rank, self.device = config, rank, torch.device(config.device)
        self.tokenizer = tokenizer()
        self.model = build_model(self.tokenizer, config.seed).to(self.device).train()
        self.ema = build_model(self.tokenizer, config.seed).to(self.device).eval().requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.heads = DenseHeads(self.model.config.text_config.hidden_size).to(self.device)
        self.token_weight = torch.ones(self.model.config.text_config.vocab_size, device=self.device)
        digits = [f"{prefix}{digit}" for prefix in ("", "##") for digit in range(10)]
        self.token_weight[self.tokenizer.convert_tokens_to_ids(digits)] = DIGIT_WEIGHT
        matrices, fused, rest = _split_parameters(self.model)
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, fused, lr=config.muon_lr),
            torch.optim.AdamW(
                [*rest, *self.heads.parameters()], lr=config.adam_lr, betas=(0.9, 0.98), weight_decay=0.0
            ),
        ]
        self.step, self.elapsed_s, self._clock = 0, 0.0, time.monotonic()

    @property
    def checkpoint(self) -> Path:
        return self.config.out / "checkpoint.pt"

    def save(self) -> None:
        """Write model, EMA, heads, optimisers and progress, atomically."""
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "elapsed_s": self.elapsed_s,
        }
        self.config.out.mkdir(parents=True, exist_ok=True)
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def resume(self) -> bool:
        """Continue from the checkpoint in `config.out`, if there is one."""
        if not self.checkpoint.exists():
            return False
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.heads.load_state_dict(state["heads"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.elapsed_s = state["step"], state["elapsed_s"]
        return True

    @property
    def progress(self) -> float:
        """Share of the schedule's wall-clock time that has passed, 0..1."""
        return min(self.elapsed_s / (60 * self.config.minutes), 1.0)

    @property
    def done(self) -> bool:
        return self.progress >= 1 or self.step == self.config.max_steps

    def next_batch(self) -> Batch:
        """The next batch: same kind in all processes, different scenes. Depends on seed, step, rank and progress."""
        rng = np.random.default_rng([self.config.seed, self.step])
        task = curriculum(rng, self.progress, self.config.token_budget)
        first = (self.step * self.config.procs + self.rank) * 1024
        return build_batch(self.tokenizer, task, "train", first).to(self.device)

    def train_step(self) -> dict[str, float]:
        """One step on the next batch; returns its losses."""
        batch = self.next_batch()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            answer_loss, dense_loss = self._losses(batch)
        dense_weight = self.config.dense_weight * (1 - 0.95 * self.progress)
        (answer_loss + dense_weight * dense_loss).backward()
        self._average_and_clip()
        rate = _learning_rate(self.progress, self.config.warmup)
        for optimizer, base in zip(self.optimizers, (self.config.muon_lr, self.config.adam_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._update_ema()
        return {"answer": answer_loss.item(), "dense": dense_loss.item()}

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Losses of the answers (0 without questions: then only the encoder runs) and of the vision tokens' labels."""
        if not batch.target.shape[1]:
            vision = (
                encode_vision(self.model, batch.frames.flatten(0, 1)).unflatten(0, batch.frames.shape[:2]).flatten(1, 2)
            )
            return vision.new_zeros(()), self.heads.loss(vision, None, batch.dense)
        out = forward(self.model, batch.frames, batch.grid, batch.tail_ids, batch.tail_offset, batch.tail_slot)
        answered = batch.target >= 0
        scores = logits(self.model, out.tail[answered]).float()
        answer_loss = F.cross_entropy(scores, batch.target[answered], weight=self.token_weight)
        return answer_loss, self.heads.loss(out.vision, out.middle, batch.dense)

    def _average_and_clip(self) -> None:
        """Average gradients over processes, clip to norm 1; all clocks advance by the mean time since the last call."""
        params = [p for p in (*self.model.parameters(), *self.heads.parameters()) if p.grad is not None]
        passed = time.monotonic() - self._clock
        flat = torch.cat([torch.tensor([passed], device=self.device), *(p.grad.flatten() for p in params)])
        if self.config.procs > 1:
            dist.all_reduce(flat)
            flat /= self.config.procs
        self.elapsed_s += float(flat[0])
        self._clock += passed
        flat[1:] *= min(1.0, 1.0 / (float(flat[1:].norm()) + 1e-6))
        start = 1
        for p in params:
            p.grad.copy_(flat[start : start + p.numel()].view_as(p))
            start += p.numel()

    @torch.no_grad()
    def _update_ema(self) -> None:
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)

    def run(self) -> None:
        """Train to the end of the schedule; rank 0 regularly saves, validates the EMA weights and prints one line."""
        self._clock = time.monotonic()
        next_save, next_validation, recent = self.elapsed_s, self.elapsed_s + 60 * self.config.validate_minutes, []
        while not self.done:
            recent.append(self.train_step())
            if self.rank:
                continue
            if self.step % 50 == 0:
                mean = {name: float(np.mean([losses[name] for losses in recent])) for name in recent[0]}
                recent.clear()
                self._log(" ".join(f"{name} {value:.3f}" for name, value in mean.items()))
            if self.elapsed_s >= next_save:
                self.save()
                next_save = self.elapsed_s + 60 * self.config.save_minutes
            if self.elapsed_s >= next_validation:
                self._log(
                    "validation " + as_line(exact_match(self.ema, self.tokenizer, "validation", self.config.validation))
                )
                next_validation = self.elapsed_s + 60 * self.config.validate_minutes
        if self.rank == 0:
            self.save()
            self._log("final " + as_line(exact_match(self.ema, self.tokenizer, "validation", self.config.validation)))

    def _log(self, text: str) -> None:
        print(f"step {self.step} minute {self.elapsed_s / 60:.1f} {text}", flush=True)


def _split_parameters(model: Qwen2_5_VLForConditionalGeneration) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Matrices for Muon, fused qkv matrices for Muon, and the rest (embeddings, patch projection, norms, biases)."""
    matrices: list[Tensor] = []
    fused: list[Tensor] = []
    rest: list[Tensor] = []
    for name, param in model.named_parameters():
        if param.ndim != 2 or "embed_tokens" in name:
            rest.append(param)
        else:
            (fused if "qkv" in name else matrices).append(param)
    return matrices, fused, rest


def _learning_rate(progress: float, warmup: float) -> float:
    """Linear warm-up, then half a cosine to 0."""
    if progress < warmup:
        return 0.05 + 0.95 * progress / warmup
    return 0.5 * (1 + float(np.cos(np.pi * (progress - warmup) / (1 - warmup))))
