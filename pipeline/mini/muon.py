"""The Muon optimizer: momentum orthogonalised by five Newton–Schulz steps, for matrices. Trains faster than AdamW here.

Updates are scaled to an RMS of 0.2·lr per element, so that learning rates are comparable with AdamW's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """For 2-D parameters only. A fused `qkv` matrix [3·d, d] counts as three (`fused` parameters)."""

    def __init__(
        self,
        params: Iterable[Tensor],
        fused: Iterable[Tensor] = (),
        lr: float = 4e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": 1}
        super().__init__([{"params": list(params), "parts": 1}, {"params": list(fused), "parts": 3}], defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update; matrices of one shape are orthogonalised together."""
        same_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor, dict]]] = defaultdict(list)
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(param)
                state["momentum"].lerp_(param.grad, 1 - group["momentum"])
                update = param.grad.lerp(state["momentum"], group["momentum"])  # Nesterov
                for part, matrix in zip(update.chunk(group["parts"]), param.chunk(group["parts"]), strict=True):
                    wide = part if part.shape[0] <= part.shape[1] else part.T
                    same_shape[(wide.shape[0], wide.shape[1])].append((wide, matrix, group))
        for (_, columns), entries in same_shape.items():
            directions = orthogonalize(torch.stack([wide for wide, _, _ in entries]))
            for direction, (_, matrix, group) in zip(directions, entries, strict=True):
                upright = direction if direction.shape == matrix.shape else direction.T
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(upright, alpha=-0.2 * columns**0.5 * group["lr"])


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearly orthogonal factor of each wide matrix [N, m, n], m ≤ n: singular values come close to 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(-1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
