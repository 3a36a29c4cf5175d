"""The KV caches of one prompt in prefill: layers that all questions share (trunk), then each question's (branch)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightkv.engine.budget import Cached
from lightkv.engine.fold import fold_layer, folded
from lightkv.engine.layerkv import Bits, LayerKV
from lightkv.engine.piece import History
from lightkv.engine.stages import Stages
from lightkv.vision.tokens import Compressed

TOKENS_AT_ONCE = 16_384  # tokens of all questions that run through the layers together; always at least one question


@dataclass
class Branch:
    """The layers that depend on one question; `PromptCaches.trunk` is the layers before them, without a question.

    layers   their numbers; kv has one cache for each
    held     vision tokens in each of these layers
    merges   per piece: targets of its vision per stage, in vision tokens of the prompt; only where the prompt is traced
    cached   under a budget: the tokens that these layers hold; None where there are none, or no layers
    """

    question: Tensor
    layers: range
    kv: list[LayerKV]
    held: list[int]
    merges: list[list[Tensor]] = field(default_factory=list)
    cached: Cached | None = None


class PromptCaches:
    """The trunk and the branches, one per question.

    fold    after each piece, layers keep what the last stage left of it; layers shared by several questions keep what
            the shared stages left
    silent  layers that keep only the text of a finished piece
    """

    def __init__(
        self, questions: Sequence[Tensor], stages: Stages, depth: int, bits: Bits, fold: bool, silent: frozenset[int]
    ) -> None:
        self._stages, self._fold, self._silent = stages, fold, silent

        def branch(question: Tensor, layers: range) -> Branch:
            return Branch(question, layers, [LayerKV(bits) for _ in layers], [0] * len(layers))

        shared = stages.shared_layers
        self.trunk = branch(torch.empty(0), shared)
        self.branches = [branch(question, range(shared.stop, depth)) for question in questions]

    def __iter__(self) -> Iterator[Branch]:
        """The trunk, then the branches."""
        yield self.trunk
        yield from self.branches

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for branch in self for layer in branch.kv)

    @property
    def uniform(self) -> bool:
        """Whether every layer may be folded to what the last stage left: one question, or branches without layers."""
        return len(self.branches) == 1 or not self.branches[0].layers

    def kv(self, branch: Branch) -> list[LayerKV]:
        """The caches of all layers for one question."""
        return [*self.trunk.kv, *branch.kv]

    def vision_layers(self, branch: Branch) -> list[int]:
        """The branch's layers that are not silent."""
        return [layer for layer in branch.layers if layer not in self._silent]

    def batches(self, tokens: int = 0) -> Iterator[list[Branch]]:
        """The branches in batches of TOKENS_AT_ONCE; each counts its question's tokens, or `tokens` if that is more.

        So peak memory stays that of one piece, however many questions there are.
        """
        batch: list[Branch] = []
        taken = 0
        for branch in self.branches:
            more = max(tokens, len(branch.question))
            if batch and taken + more > TOKENS_AT_ONCE:
                yield batch
                batch, taken = [], 0
            batch.append(branch)
            taken += more
        yield batch

    def seal(self, rest: bool = False) -> None:
        """Quantise full groups of tokens in every layer; with `rest` all tokens."""
        for branch in self:
            for layer in branch.kv:
                layer.seal(rest)

    def settle(self, marks: Sequence[Sequence[int]], shared: History, own: Sequence[History]) -> None:
        """Reduce a finished piece in every layer to what the layer keeps of it.

        marks: every layer's length before the piece, per branch · shared, own: the piece's history in the trunk and
        in each branch
        """
        for branch, history, lengths in zip(self, (shared, *own), marks, strict=True):
            for number, (layer, mark) in enumerate(zip(branch.layers, lengths, strict=True)):
                branch.held[number] += self._settle_layer(layer, branch.kv[number], mark, history)

    def _settle_layer(self, number: int, layer: LayerKV, mark: int, history: History) -> int:
        """The vision tokens that the layer keeps of the piece."""
        group = next(group for group, layers in enumerate(self._stages.groups) if number in layers)
        entered, final = history.states[group], history.states[-1]
        if number in self._silent:
            text = torch.nonzero(entered.layout.is_text).flatten()
            k, v, log_size = layer.since(mark)
            layer.truncate(mark)
            layer.push(k[:, text], v[:, text], log_size[text])
            return 0
        if self._fold and group < len(history.states) - 1:
            fold_layer(layer, mark, entered, history, self._stages.log_size(final.size))
            return final.vision_tokens
        return entered.vision_tokens

    def note_cached(self, shared: History, own: Sequence[History], coordinates: Tensor) -> None:
        """Under a budget: add a settled piece to what each branch has cached; coordinates int64 [n, 4] of the piece."""
        for branch, history in zip(self, (shared, *own), strict=True):
            if branch is self.trunk or (branch.layers and not self.uniform):
                more = Cached.of_piece(history, coordinates)
                branch.cached = more if branch.cached is None else branch.cached.after(more)

    def merge(
        self, branch: Branch, before: Cached, after: Cached, done: Compressed, angles: tuple[Tensor, Tensor]
    ) -> None:
        """Merge a branch's cached tokens from `before` to `after`; angles (cos, sin) of `before`.

        The trunk's merge includes the branches where these hold the same tokens (`uniform`).
        """
        everything = torch.arange(len(before), device=before.size.device)
        into = torch.searchsorted(done.kept, done.target)
        for one in (branch, *self.branches) if self.uniform else (branch,):
            for number, layer in enumerate(one.kv):
                if one.layers[number] in self._silent:
                    continue
                k, v, _ = layer.since(0)
                k, v = folded(k, v, angles, before.size, into, done.kept, everything)
                layer.truncate(0)
                layer.push(k, v, self._stages.log_size(after.size))
                one.held[number] = after.vision
        branch.cached = after

    def lengths(self) -> list[list[int]]:
        """Tokens in every layer, per branch."""
        return [[len(layer) for layer in branch.kv] for branch in self]

    def state(self) -> Any:
        """What `restore` needs; valid until tokens are sealed or merged."""
        return self.lengths(), [(list(branch.held), list(branch.merges), branch.cached) for branch in self]

    def restore(self, state: Any) -> None:
        """Undo everything since `state`."""
        for branch, lengths, (held, merges, cached) in zip(self, *state, strict=True):
            branch.held, branch.merges, branch.cached = held, merges, cached
            for layer, length in zip(branch.kv, lengths, strict=True):
                layer.truncate(length)
