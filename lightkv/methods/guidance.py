"""Computes scores of vision tokens from a layer's queries and keys, such as prompt guidance (the paper's step 1)."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightkv.ops.ragged import Selection, Sequences
from lightkv.ops.votes import softmax_votes
from lightkv.vision.layout import VisionLayout
from lightkv.vision.packing import Packing


def prompt_guidance(q: Tensor, k: Tensor, is_text: Tensor, scale: float) -> Tensor:
    """Prompt guidance g_i = Σ_heads Σ_{j∈text} softmax over queries i of (q_i · k_j · scale).

    Every text key distributes one vote per head over all queries, without the causal mask: Σ_i g_i = heads · |text|.

    q [Hq, S, d] and k [Hkv, S, d] after RoPE (a key head serves Hq/Hkv query heads), is_text bool [S] → fp32 [S].
    """
    one = Packing((q.shape[1],), q.shape[1], q.device)
    return _prompt_votes(q[None], k[None], is_text, one, scale)


def _prompt_votes(q: Tensor, k: Tensor, voters: Tensor, packing: Packing, scale: float) -> Tensor:
    """`prompt_guidance` for each sequence of a batch separately: q [B, Hq, S, d], voters bool [N] → fp32 [N]."""
    queries, keys = _Side.of(torch.ones_like(voters), packing), _Side.of(voters, packing)
    return softmax_votes(queries.selection(q), keys.selection(k), scale, "sum")


@dataclass(frozen=True)
class _Side:
    """A selection of n packed tokens, in the form that `softmax_votes` takes.

    token   int64 [n] index among the packed tokens
    index   int64 [n] index in the flattened batch
    starts  int64 [B + 1] where each sequence begins among the n
    most    largest number of selected tokens in a sequence
    """

    token: Tensor
    index: Tensor
    starts: Tensor
    most: int

    @classmethod
    def of(cls, chosen: Tensor, packing: Packing) -> "_Side":
        token = torch.nonzero(chosen).flatten()
        row, index = packing.row.to(token.device)[token], packing.index.to(token.device)[token]
        counts = row.new_zeros(len(packing.lengths)).index_add(0, row, torch.ones_like(row))  # bincount would wait
        return cls(token, index, torch.cat([counts.new_zeros(1), counts.cumsum(0)]), int(counts.max()))

    def selection(self, states: Tensor) -> Selection:
        return Selection(states, self.index, Sequences(self.starts, self.most))


class Guidance(Protocol):
    """A source of merge weights: the positions whose keys vote, or None for equal weights."""

    def voters(self, layout: VisionLayout, row: Tensor | None = None) -> Tensor | None:
        """Bool [S]; row int64 [S] is the sequence of each token, None for a single sequence."""


@dataclass(frozen=True)
class PromptGuidance:
    """All text votes: system prompt, template, and the user's text before and after the vision tokens."""

    def voters(self, layout: VisionLayout, row: Tensor | None = None) -> Tensor:
        return layout.is_text


@dataclass(frozen=True)
class QuestionGuidance:
    """Only text after the last vision token votes: the user's question, without the system prompt."""

    def voters(self, layout: VisionLayout, row: Tensor | None = None) -> Tensor:
        row = torch.zeros_like(layout.item) if row is None else row
        place = torch.arange(len(layout), device=row.device)
        vision = torch.where(layout.is_vision, place, -1)
        last = torch.full_like(place, -1).scatter_reduce(0, row, vision, "amax")
        return layout.is_text & (place > last[row])


@dataclass(frozen=True)
class UniformGuidance:
    """No token votes; all weights are equal."""

    def voters(self, layout: VisionLayout, row: Tensor | None = None) -> None:
        return None


GUIDANCES: dict[str, Guidance] = {
    "prompt": PromptGuidance(),
    "question": QuestionGuidance(),
    "uniform": UniformGuidance(),
}


class Scorer(Protocol):
    """Computes the scores that a stage needs from the layer before it."""

    def __call__(self, q: Tensor, k: Tensor, layout: VisionLayout, packing: Packing, scale: float) -> Tensor:
        """Scores fp32 [N] of the packed tokens, from q [B, Hq, S, d] and k [B, Hkv, S, d] after RoPE."""

    def pairs(self, tokens: int, text_tokens: int) -> int:
        """Query–key products per head for a sequence of `tokens` tokens, for cost estimates."""


@dataclass(frozen=True)
class Votes:
    """Prompt guidance with the voters of one of GUIDANCES; equal weights if none vote."""

    rule: Guidance

    def __call__(self, q: Tensor, k: Tensor, layout: VisionLayout, packing: Packing, scale: float) -> Tensor:
        voters = self.rule.voters(layout, packing.row.to(q.device))
        if voters is None:
            return torch.ones(len(layout), device=q.device)
        return _prompt_votes(q, k, voters, packing, scale)

    def pairs(self, tokens: int, text_tokens: int) -> int:
        return tokens * text_tokens


@dataclass(frozen=True)
class QuestionAttention:
    """The largest attention that any question token, in any head, pays to a vision token; softmax over vision only.

    The question is the text after the last vision token: by causality the only text that attends to all of them.
    Without such text all scores are equal. Sizes of merged tokens do not count.
    """

    def __call__(self, q: Tensor, k: Tensor, layout: VisionLayout, packing: Packing, scale: float) -> Tensor:
        keys = _Side.of(layout.is_vision, packing)
        queries = _Side.of(QuestionGuidance().voters(layout, packing.row.to(q.device)), packing)
        best = softmax_votes(keys.selection(k), queries.selection(q), scale, "max")
        return torch.zeros(len(layout), device=q.device).index_copy(0, keys.token, best)

    def of_keys(self, q: Tensor, k: Tensor, vision: Tensor, scale: float) -> Tensor:
        """The same scores for given keys: fp32 [n], 0 except at vision keys.

        q [Hq, T, d] are the question's queries, k [Hkv, n, d] any keys, `vision` int64 the indices of vision keys.
        """
        keys = Selection(k[None], vision, Sequences.of([len(vision)], q.device))
        text = torch.arange(q.shape[1], device=q.device)
        best = softmax_votes(keys, Selection(q[None], text, Sequences.of([len(text)], q.device)), scale, "max")
        return torch.zeros(k.shape[1], device=q.device).index_copy(0, vision, best)

    def pairs(self, tokens: int, text_tokens: int) -> int:
        """Counts all text as if it came after the vision tokens."""
        return (tokens - text_tokens) * text_tokens


@dataclass(frozen=True)
class LastQuery:
    """The attention that the last prompt token pays to every token, averaged over heads."""

    def __call__(self, q: Tensor, k: Tensor, layout: VisionLayout, packing: Packing, scale: float) -> Tensor:
        queries = q[:, :, -1].float().unflatten(1, (k.shape[1], -1))  # [B, Hkv, Hq / Hkv, d]
        scores = queries @ k.float().transpose(2, 3) * scale
        column = torch.arange(packing.width, device=q.device)
        padding = column < torch.tensor(packing.pads, device=q.device)[:, None]
        attention = torch.softmax(scores.masked_fill(padding[:, None, None], -torch.inf), dim=-1)
        return packing.pack(attention.mean(dim=(1, 2)))

    def pairs(self, tokens: int, text_tokens: int) -> int:
        return tokens
