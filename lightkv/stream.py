"""Streaming prefill: a prompt goes through the decoder piece by piece, compressed as it goes.

A piece (some images, some seconds of a video, the text around them) passes the layers group by group, a stage between
two groups, attending to what earlier pieces have left in each layer's cache. Where a stage asks for the question's
attention, the question passes the layers before it as a temporary suffix that leaves nothing behind. When all pieces
are in, the question itself follows. Memory is one piece beside the compressed cache.

Several questions share everything up to the first stage that depends on them; from there each has layers of its own
(branches). Without such a stage they share the whole prompt but themselves.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightkv.budget import Cached
from lightkv.config import LightKVConfig
from lightkv.errors import ConfigError, LightKVError, out_of_memory
from lightkv.fold import folded, mean_by_size
from lightkv.guidance import Scorer
from lightkv.layerkv import Bits, LayerKV
from lightkv.layers import Layers
from lightkv.layout import TEXT, Span, VisionLayout, coordinates
from lightkv.methods import METHODS
from lightkv.ops.attend import attend
from lightkv.packing import Packing
from lightkv.rotary import Positions
from lightkv.segments import Segment, Vision
from lightkv.tokens import Tokens

NO_STAGES = LightKVConfig((), method="spacetime")  # steps that stand for several are heard as several


@dataclass(frozen=True)
class Piece:
    """Tokens on their way through the layers.

    hidden [n, D] · layout of the n tokens · size fp32 [n] · positions int64 [axes, n] ·
    place int64 [n]: which tokens of the whole piece they are, ascending
    """

    hidden: Tensor
    layout: VisionLayout
    size: Tensor
    positions: Tensor
    place: Tensor


@dataclass(frozen=True)
class Heard:
    """Queries and keys of one layer, [H, n, d], for the scores of the stage after it."""

    q: Tensor
    k: Tensor
    scale: float


@dataclass(frozen=True)
class Passage:
    """A piece's way so far: per group of layers what it was there, and per stage where its tokens went.

    targets int64 [n] per stage: the token of the whole piece that each of its tokens is part of by then; -1: dropped
    """

    states: list[Piece] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    heard: Heard | None = None

    def branched(self) -> "Passage":
        return Passage(list(self.states), list(self.targets), self.heard)


@dataclass
class Branch:
    """The layers after the first stage that depends on one question.

    held     vision tokens in each of these layers
    merges   per piece: its `Passage.targets`, vision only, in vision tokens of the prompt; kept where it is traced
    """

    question: Tensor
    kv: list[LayerKV]
    held: list[int]
    merges: list[list[Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class Prefilled:
    """One question, ready to be answered.

    kv, tail   per layer: what came before the question (in part shared with its siblings), and k, v [Hkv, T, d] of it
    first      fp32 [V]: logits of the first token of the answer
    position   of that token
    held       vision tokens in each layer
    merges     per stage int64 [V]: the vision token of the prompt that each is part of by then; -1: dropped
    """

    kv: list[LayerKV]
    tail: list[tuple[Tensor, Tensor]]
    first: Tensor
    position: int
    held: tuple[int, ...]
    merges: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Of its cache, as if it shared nothing."""
        return sum(layer.nbytes for layer in self.kv) + sum(k.nbytes + v.nbytes for k, v in self.tail)


class Stream:
    """One prompt on its way in: `take` its pieces in order, then `finish`.

    fold     after a piece all of its layers hold what the last stage has left of it (fold.py); the layers that several
             questions share are left as they are
    silent   layers that keep no vision once a piece is through: what comes later does not see it there
    budget   vision tokens in a layer's cache at most, but for the last piece (budget.py); needs fold
    traced   remember where every vision token went
    """

    def __init__(
        self,
        layers: Layers,
        positions: Positions,
        config: LightKVConfig | None,
        questions: Sequence[Tensor],
        bits: Bits,
        *,
        fold: bool = False,
        silent: frozenset[int] = frozenset(),
        budget: int | None = None,
        traced: bool = False,
    ) -> None:
        self._layers, self._positions = layers, positions
        self._config = NO_STAGES if config is None else config
        self._method = METHODS[self._config.method]
        self._fold, self._silent, self._traced = fold, silent, traced and budget is None
        self._budget = budget
        self._cached: Cached | None = None  # what the layers hold, under a budget
        self._items = 0  # images and videos that came in
        bounds = [0, *(stage.layer + 1 for stage in self._config.stages), len(layers)]
        self._groups = [range(*bound) for bound in pairwise(bounds)]
        stages = len(self._config.stages)
        # Groups up to this one are shared: the stage after it is the first that depends on the question.
        self._split = next((number for number in range(stages) if self._scorer(number) is not None), stages)
        shared = self._groups[self._split].stop
        self._trunk = Branch(torch.empty(0), [LayerKV(bits) for _ in range(shared)], [0] * shared)
        own = len(layers) - shared
        self._branches = [
            Branch(question.to(layers.device), [LayerKV(bits) for _ in range(own)], [0] * own) for question in questions
        ]
        if budget is not None and not (fold and (len(questions) == 1 or not own)):
            raise ConfigError(
                "a budget needs fold=True, and several questions a method that none of them guides (spacetime): "
                "all layers must hold the same tokens"
            )
        self.vision_tokens = 0  # of the prompt, repeats that were never encoded included
        self.text_tokens = 0  # of the prompt so far, the questions not included
        self._given = 0  # vision tokens that came in

    @property
    def nbytes(self) -> int:
        """Of all caches of this prompt."""
        return sum(layer.nbytes for branch in (self._trunk, *self._branches) for layer in branch.kv)

    @torch.no_grad()
    def take(self, segments: Sequence[Segment]) -> None:
        """Prefill the next piece of the prompt. When that fails, all is as it was before."""
        self._keep_to_budget()
        self._seal()
        undo = self._state()
        try:
            self._prefill(self._piece(segments))
        except BaseException:
            self._restore(undo)
            raise

    @torch.no_grad()
    def finish(self) -> list[Prefilled]:
        """The questions themselves, each after everything that came before."""
        self._keep_to_budget()
        self._seal(rest=True)
        prefilled = []
        for branch in self._branches:
            kv = [*self._trunk.kv, *branch.kv]
            suffix = self._suffix(branch.question)
            tail: list[tuple[Tensor, Tensor]] = []
            hidden, _ = self._beside(suffix, range(len(self._layers)), kv, tail)
            position = int(suffix.positions[0, -1]) + 1
            merges = tuple(torch.cat(parts) for parts in zip(*branch.merges, strict=True))
            held = (*self._trunk.held, *branch.held)
            prefilled.append(Prefilled(kv, tail, self._layers.logits(hidden[-1]), position, held, merges))
        return prefilled

    def _seal(self, rest: bool = False) -> None:
        """Pack what earlier pieces have left, which stays; under a budget only at the end."""
        if self._budget is not None and not rest:
            return
        for branch in (self._trunk, *self._branches):
            for layer in branch.kv:
                layer.seal(rest)

    def _keep_to_budget(self) -> None:
        """Merge what is cached where it is more than the budget; nothing is sealed yet."""
        merged = self._cached.merged(self._budget) if self._cached is not None and self._budget is not None else None
        if merged is None:
            return
        before, (after, done) = self._cached, merged
        assert before is not None
        everything = torch.arange(len(before), device=before.size.device)
        into = torch.searchsorted(done.kept, done.target)
        cos, sin = self._layers.angles(before.positions[:, None])
        try:
            for branch in (self._trunk, *self._branches):
                first = 0 if branch is self._trunk else len(self._trunk.kv)
                for number, layer in enumerate(branch.kv):
                    if first + number in self._silent:
                        continue
                    k, v, _ = layer.since(0)
                    k, v = folded(k, v, (cos[0], sin[0]), before.size, into, done.kept, everything)
                    layer.truncate(0)
                    layer.push(k, v, after.size.log())
                    branch.held[number] = after.vision
        except Exception as error:
            if out_of_memory(error):  # some layers are merged and some are not: there is no way back
                raise LightKVError("memory ran out while the cache was merged to its budget") from error
            raise
        self._cached = after

    # --- one piece ---

    def _piece(self, segments: Sequence[Segment]) -> Piece:
        device, dtype = self._layers.device, self._layers.dtype
        hidden, positions, sizes, length = [], [], [], 0
        where: list[Tensor] = []
        spans: list[Span] = []
        for segment in segments:
            if isinstance(segment, Vision):
                hidden.append(segment.features.to(device, dtype))
                positions.append(self._positions.vision(segment))
                sizes.append(segment.sizes)
                if segment.first and spans and spans[-1][0] + math.prod(spans[-1][1:]) == length:
                    begin, t, h, w = spans[-1]  # more of the item before it: one item to the stages
                    spans[-1] = (begin, t + segment.grid[0], h, w)
                else:
                    spans.append((length, *segment.grid))
                self._items += segment.first == 0
                place = coordinates(*segment.grid)
                place[:, 0] = segment.steps[place[:, 0]]
                where.append(F.pad(place, (1, 0), value=self._items - 1))
                self.vision_tokens += segment.stands_for
            else:
                hidden.append(self._layers.embed(segment.ids))
                positions.append(self._positions.text(len(segment)))
                sizes.append(torch.ones(len(segment)))
                where.append(torch.tensor([TEXT, 0, 0, 0]).expand(len(segment), -1))
                self.text_tokens += len(segment)
            length += len(segment)
        layout = VisionLayout.grids(spans, length).to(device)
        self._where = torch.cat(where).to(device)
        place = torch.arange(length, device=device)
        return Piece(torch.cat(hidden), layout, torch.cat(sizes).to(device), torch.cat(positions, 1).to(device), place)

    def _prefill(self, piece: Piece) -> None:
        begun = [[len(layer) for layer in branch.kv] for branch in (self._trunk, *self._branches)]
        passage = Passage()
        for number in range(self._split + 1):
            stage = number - 1
            piece, heard = self._group(
                number, self._stage(stage, piece, None, passage) if number else piece, passage, self._trunk.kv
            )
            passage = replace(passage, heard=heard)
        passages = [self._branch(piece, passage.branched(), branch) for branch in self._branches]
        # What several questions share cannot end as each of them would have it.
        alone = passages[0] if len(passages) == 1 or not self._branches[0].kv else passage
        for branch, way, marks in zip((self._trunk, *self._branches), (alone, *passages), begun, strict=True):
            first = 0 if branch is self._trunk else len(self._trunk.kv)
            for number, (layer, mark) in enumerate(zip(branch.kv, marks, strict=True)):
                branch.held[number] += self._settle(first + number, layer, mark, way)
        if self._budget is not None:
            self._note_cached(alone)
        for branch, way in zip(self._branches, passages, strict=True):
            if self._traced and way.targets:
                branch.merges.append(self._traced_targets(way))
        self._given += int(passage.states[0].layout.is_vision.sum())

    def _branch(self, piece: Piece, passage: Passage, branch: Branch) -> Passage:
        """The groups that one question has to itself: the piece, and beside it the question as a temporary suffix."""
        if self._split == len(self._config.stages):
            return passage
        kv = [*self._trunk.kv, *branch.kv]
        suffix = self._suffix(branch.question)
        # Up to the first of its stages the question has to pass all layers so far, which hold this piece already.
        hidden, said = self._beside(suffix, range(self._groups[self._split].stop), kv)
        heard = passage.heard
        for number in range(self._split + 1, len(self._groups)):
            score = self._score(number - 1, piece, heard, said)
            piece, heard = self._group(number, self._stage(number - 1, piece, score, passage), passage, kv)
            if self._listens(number):
                hidden, said = self._beside(replace(suffix, hidden=hidden), self._groups[number], kv)
        return passage

    def _stage(self, number: int, piece: Piece, score: Tensor | None, passage: Passage) -> Piece:
        """What stage `number` leaves of the piece; where the tokens went is noted in the passage."""
        stage = self._config.stages[number]
        if not bool(piece.hidden.isfinite().all()):  # what is no number has no nearest neighbour: merging never ends
            raise FloatingPointError(f"the hidden states before the stage after layer {stage.layer} are not finite")
        layout = piece.layout.squared() if self._config.windows == "released" else piece.layout
        done = self._method.compress(Tokens(piece.hidden, layout, piece.size, score), stage, self._config)
        went = torch.where(done.target < 0, -1, piece.place[done.target])
        if passage.targets:
            before = passage.targets[-1]
            index = torch.searchsorted(piece.place, before.clamp(min=0))
            went = torch.where(before < 0, -1, went[index])
        passage.targets.append(went)
        positions, place = piece.positions[:, done.kept], piece.place[done.kept]
        return Piece(done.hidden, layout.take(done.kept), done.size, positions, place)

    def _group(self, number: int, piece: Piece, passage: Passage, kv: list[LayerKV]) -> tuple[Piece, Heard | None]:
        """The piece after the layers of group `number`, whose keys and values go to their caches."""
        passage.states.append(piece)
        log_size, listens = piece.size.log(), self._listens(number)
        heard: list[Heard] = []
        weighs = self._method.proportional

        def attend_to(index: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            if listens and index == self._groups[number][-1]:
                heard.append(Heard(q[0], k[0], scale))
            kv[index].push(k[0], v[0], log_size if weighs else torch.zeros_like(log_size))
            return _over(kv[index], q, scale)

        angles = self._layers.angles(piece.positions[:, None])
        hidden = self._layers.run(piece.hidden[None], angles, self._groups[number], attend_to)[0]
        return replace(piece, hidden=hidden), heard[0] if heard else None

    def _suffix(self, question: Tensor) -> Piece:
        """The question where it would stand if the prompt ended here."""
        place, device = torch.arange(len(question)), question.device
        layout = VisionLayout.grids([], len(question)).to(device)
        positions = self._positions.text(len(question), taken=False).to(device)
        ones = torch.ones(len(question), device=device)
        return Piece(self._layers.embed(question), layout, ones, positions, place.to(device))

    def _beside(
        self, suffix: Piece, which: range, kv: list[LayerKV], tail: list[tuple[Tensor, Tensor]] | None = None
    ) -> tuple[Tensor, Heard]:
        """hidden [T, D] of the suffix after some layers, which it leaves as they were; its own KV goes to `tail`."""
        heard: list[Heard] = []

        def attend_to(index: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            if index == which[-1]:
                heard.append(Heard(q[0], k[0], scale))
            if tail is not None:
                tail.append((k[0], v[0]))
            layer, mark = kv[index], len(kv[index])
            layer.push(k[0], v[0], torch.zeros_like(suffix.size))
            seen = _over(layer, q, scale)
            layer.truncate(mark)
            return seen

        angles = self._layers.angles(suffix.positions[:, None])
        return self._layers.run(suffix.hidden[None], angles, which, attend_to)[0], heard[0]

    # --- what a stage wants to know ---

    def _scorer(self, stage: int) -> Scorer | None:
        return self._method.scorer(self._config, stage)

    def _listens(self, group: int) -> bool:
        """Whether the stage after this group asks for the attention of its last layer."""
        return group < len(self._config.stages) and self._scorer(group) is not None

    def _score(self, stage: int, piece: Piece, heard: Heard | None, said: Heard) -> Tensor | None:
        """fp32 [n] for the piece, with the question as the text after it."""
        scorer = self._scorer(stage)
        if scorer is None:
            return None
        assert heard is not None
        length, device = piece.hidden.shape[0] + said.q.shape[1], piece.hidden.device
        text = VisionLayout.grids([], said.q.shape[1]).to(device)
        layout = VisionLayout.packed([piece.layout, text])
        q, k = torch.cat([heard.q, said.q], 1), torch.cat([heard.k, said.k], 1)
        score = scorer(q[None], k[None], layout, Packing((length,), length, device), heard.scale)
        return score[: piece.hidden.shape[0]]

    # --- when a piece is through ---

    def _settle(self, index: int, layer: LayerKV, mark: int, way: Passage) -> int:
        """Leave in a layer what shall stay of the piece; returns how many vision tokens that are."""
        group = next(number for number, group in enumerate(self._groups) if index in group)
        here, final = way.states[group], way.states[-1]
        if index in self._silent:
            stays = torch.nonzero(here.layout.is_text).flatten()
            k, v, log_size = layer.since(mark)
            layer.truncate(mark)
            layer.push(k[:, stays], v[:, stays], log_size[stays])
            return 0
        if self._fold and group < len(way.states) - 1:
            angles = self._layers.angles(here.positions[:, None])
            into = torch.searchsorted(final.place, way.targets[-1][here.place].clamp(min=0))
            into = torch.where(way.targets[-1][here.place] < 0, -1, into)
            k, v, _ = layer.since(mark)
            k, v = folded(k, v, (angles[0][0], angles[1][0]), here.size, into, final.place, here.place)
            layer.truncate(mark)
            layer.push(k, v, final.size.log())
            here = final
        return int(here.layout.is_vision.sum())

    def _note_cached(self, way: Passage) -> None:
        """The tokens of the piece that are now in every layer's cache."""
        first, final = way.states[0], way.states[-1]
        features = first.hidden
        if way.targets:
            target = way.targets[-1]
            into = torch.where(target < 0, -1, torch.searchsorted(final.place, target.clamp(min=0)))
            features = mean_by_size(first.hidden[None].float(), first.size, into, len(final.place))[0].to(features)
        more = Cached(features, self._where[final.place], final.size, final.positions)
        self._cached = more if self._cached is None else self._cached.after(more)

    def _traced_targets(self, way: Passage) -> list[Tensor]:
        """Per stage int64 [vision tokens of the piece]: targets in vision tokens of the prompt."""
        vision = torch.nonzero(way.states[0].layout.is_vision).flatten()
        number = torch.full_like(way.states[0].place, -1)
        number[vision] = torch.arange(len(vision), device=vision.device) + self._given
        return [torch.where(went[vision] < 0, -1, number[went[vision]]) for went in way.targets]

    def _state(self) -> Any:
        branches = [
            ([len(layer) for layer in b.kv], list(b.held), list(b.merges)) for b in (self._trunk, *self._branches)
        ]
        counts = self.vision_tokens, self.text_tokens, self._given, self._items
        return branches, copy.copy(self._positions.__dict__), counts, self._cached

    def _restore(self, state: Any) -> None:
        branches, positions, counts, self._cached = state
        self.vision_tokens, self.text_tokens, self._given, self._items = counts
        self._positions.__dict__.update(positions)
        for branch, (lengths, held, merges) in zip((self._trunk, *self._branches), branches, strict=True):
            branch.held, branch.merges = held, merges
            for layer, length in zip(branch.kv, lengths, strict=True):
                layer.truncate(length)


def _over(layer: LayerKV, q: Tensor, scale: float) -> Tensor:
    """Causal attention of the last tokens of a layer over all of them: q [1, Hq, S, d] → [1, S, Hq, d]."""
    k, v, log_size = layer.view()
    return attend(q, k[None], v[None], log_size[None], None, scale)
