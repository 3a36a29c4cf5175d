"""Scores of vision tokens from a layer's queries and keys; above all prompt guidance (method step 1)."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightkv.layout import VisionLayout

SCORES_AT_ONCE = 1 << 24  # fp32 scores held at a time: 64 MiB


def prompt_guidance(q: Tensor, k: Tensor, is_text: Tensor, scale: float) -> Tensor:
    """g_i = Σ_heads Σ_{j∈text} softmax over queries i of (q_i · k_j · scale).

    Every text key hands out a vote of 1 per head, without the causal mask, so Σ_i g_i = heads · |text|.
    Only S × |text| scores exist per head, a bounded block of them at a time, all in fp32.

    q [Hq, S, d] and k [Hkv, S, d] after RoPE (a key head serves Hq/Hkv query heads), is_text bool [S] → fp32 [S].
    """
    heads, length, _ = q.shape
    group = heads // k.shape[0]
    votes = torch.zeros(length, dtype=torch.float32, device=q.device)
    at_once = max(1, SCORES_AT_ONCE // (group * length))
    for head, keys in enumerate(k[:, is_text].float()):
        queries = q[head * group : (head + 1) * group].float().transpose(1, 2)  # [group, d, S]
        for block in (keys * scale).split(at_once):
            votes += torch.softmax(block @ queries, dim=-1).sum(dim=(0, 1))
    return votes


class Guidance(Protocol):
    """A source of merge weights: the positions whose keys vote, or None for equal weights."""

    def voters(self, layout: VisionLayout) -> Tensor | None: ...


@dataclass(frozen=True)
class PromptGuidance:
    """All text votes: system prompt, template, and the user's words before and after the vision tokens."""

    def voters(self, layout: VisionLayout) -> Tensor:
        return layout.is_text


@dataclass(frozen=True)
class QuestionGuidance:
    """Only text after the last vision token votes: the user's question, without the system prompt."""

    def voters(self, layout: VisionLayout) -> Tensor:
        vision_ahead = layout.is_vision.flip(0).cumsum(0).flip(0)
        return layout.is_text & (vision_ahead == 0)


@dataclass(frozen=True)
class UniformGuidance:
    """Nobody votes; every token weighs the same."""

    def voters(self, layout: VisionLayout) -> None:
        return None


GUIDANCES: dict[str, Guidance] = {
    "prompt": PromptGuidance(),
    "question": QuestionGuidance(),
    "uniform": UniformGuidance(),
}


class Scorer(Protocol):
    """What a stage wants to know of the layer before it, for one sequence."""

    def __call__(self, q: Tensor, k: Tensor, layout: VisionLayout, scale: float) -> Tensor:
        """q [Hq, S, d] and k [Hkv, S, d] after RoPE → fp32 [S]."""

    def pairs(self, tokens: int, text_tokens: int) -> int:
        """Query–key products per head in a sequence of `tokens`, for cost estimates."""


@dataclass(frozen=True)
class Votes:
    """Prompt guidance with the voters of one of GUIDANCES; nobody votes: all weigh the same."""

    rule: Guidance

    def __call__(self, q: Tensor, k: Tensor, layout: VisionLayout, scale: float) -> Tensor:
        voters = self.rule.voters(layout)
        return torch.ones(len(layout), device=q.device) if voters is None else prompt_guidance(q, k, voters, scale)

    def pairs(self, tokens: int, text_tokens: int) -> int:
        return tokens * text_tokens


@dataclass(frozen=True)
class QuestionAttention:
    """The most that any token of the question, in any head, attends to a vision token; softmax over vision alone.

    The question is the text after the last vision token: by causality the only text that sees all of them. Where
    there is none, all score the same. How many tokens a merged one stands for does not count.
    """

    def __call__(self, q: Tensor, k: Tensor, layout: VisionLayout, scale: float) -> Tensor:
        asking = QuestionGuidance().voters(layout)
        score = torch.zeros(len(layout), device=q.device)
        vision = torch.nonzero(layout.is_vision).flatten()
        if not len(vision) or not bool(asking.any()):
            return score
        group, best = q.shape[0] // k.shape[0], torch.zeros(len(vision), device=q.device)
        at_once = max(1, SCORES_AT_ONCE // (group * len(vision)))
        for head, keys in enumerate(k[:, vision].float()):
            queries = q[head * group : (head + 1) * group, asking].float() * scale
            for block in queries.split(at_once, dim=1):
                attention = torch.softmax(block @ keys.T, dim=-1)
                best = torch.maximum(best, attention.amax(dim=(0, 1)))
        return score.index_copy(0, vision, best)

    def pairs(self, tokens: int, text_tokens: int) -> int:
        """As if all text came after the vision."""
        return (tokens - text_tokens) * text_tokens


@dataclass(frozen=True)
class LastQuery:
    """The attention that the last prompt token pays to every token, mean over heads."""

    def __call__(self, q: Tensor, k: Tensor, layout: VisionLayout, scale: float) -> Tensor:
        queries = q[:, -1].float().unflatten(0, (k.shape[0], -1))  # [Hkv, Hq / Hkv, d]
        return torch.softmax(queries @ k.float().transpose(1, 2) * scale, dim=-1).mean(dim=(0, 1))

    def pairs(self, tokens: int, text_tokens: int) -> int:
        return tokens
