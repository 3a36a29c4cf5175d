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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightkv.engine.budget import Cached
from lightkv.engine.fold import folded, mean_by_size
from lightkv.engine.layerkv import Bits, LayerKV
from lightkv.engine.layers import Layers
from lightkv.engine.piece import Heard, Passage, Piece
from lightkv.engine.positions import Positions
from lightkv.engine.segments import Segment, Vision
from lightkv.errors import LightKVError, out_of_memory
from lightkv.methods.config import LightKVConfig
from lightkv.methods.guidance import QuestionAttention, Scorer
from lightkv.methods.table import METHODS
from lightkv.ops.attend import attend
from lightkv.ops.attend_packed import attend_packed
from lightkv.ops.ragged import Keys, Sequences
from lightkv.vision.layout import TEXT, Span, VisionLayout, coordinates
from lightkv.vision.packing import Packing
from lightkv.vision.tokens import Compressed, Tokens

NO_STAGES = LightKVConfig((), method="spacetime")  # steps that stand for several are heard as several

# Of several questions, what passes the layers together is bounded, so that a piece stays what memory is made of.
TOKENS_AT_ONCE = 16_384  # of all of them, but at least one question's
KEYS_AT_ONCE = 65_536  # beyond that they are not copied for one launch: each question's are read where they are


@dataclass
class Branch:
    """The layers after the first stage that depends on one question.

    held     vision tokens in each of these layers
    merges   per piece: its `Passage.targets`, vision only, in vision tokens of the prompt; kept where it is traced
    cached   under a budget: the tokens that these layers hold; None where there are none, or no layers
    """

    question: Tensor
    kv: list[LayerKV]
    held: list[int]
    merges: list[list[Tensor]] = field(default_factory=list)
    cached: Cached | None = None


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
        with self._or_as_before():
            self._prefill(self._piece(segments))

    @torch.no_grad()
    def finish(self) -> list[Prefilled]:
        """The questions themselves, each after everything that came before."""
        self._keep_to_budget(rest=True)
        self._seal(rest=True)
        prefilled = []
        for branches in self._together():
            questions = self._suffixes(branches)
            caches = [self._kv(branch) for branch in branches]
            tails: list[list[tuple[Tensor, Tensor]]] = [[] for _ in branches]
            hidden, _ = self._beside(questions, range(len(self._layers)), caches, tails)
            for branch, kv, tail, part in zip(branches, caches, tails, questions.parts, strict=True):
                position = int(questions.positions[0, part.stop - 1]) + 1
                first = self._layers.logits(hidden[part.stop - 1])
                merges = tuple(torch.cat(parts) for parts in zip(*branch.merges, strict=True))
                prefilled.append(Prefilled(kv, tail, first, position, (*self._trunk.held, *branch.held), merges))
        return prefilled

    @property
    def _alone(self) -> bool:
        """Whether all layers can end as the last one does: there is one question, or none has layers to itself."""
        return len(self._branches) == 1 or not self._branches[0].kv

    def _log_size(self, size: Tensor) -> Tensor:
        """What a token's size adds to the scores of its key."""
        return size.log() if self._method.proportional else torch.zeros_like(size)

    def _kv(self, branch: Branch) -> list[LayerKV]:
        """Of all layers, as one question has them."""
        return [*self._trunk.kv, *branch.kv]

    def _together(self, tokens: int = 0) -> Iterator[list[Branch]]:
        """The questions, as many together as TOKENS_AT_ONCE allows when each stands for so many tokens at least."""
        some: list[Branch] = []
        taken = 0
        for branch in self._branches:
            more = max(tokens, len(branch.question))
            if some and taken + more > TOKENS_AT_ONCE:
                yield some
                some, taken = [], 0
            some.append(branch)
            taken += more
        yield some

    def _seal(self, rest: bool = False) -> None:
        """Pack what earlier pieces have left, which stays; under a budget only at the end."""
        if self._budget is not None and not rest:
            return
        for branch in (self._trunk, *self._branches):
            for layer in branch.kv:
                layer.seal(rest)

    def _keep_to_budget(self, rest: bool = False) -> None:
        """Merge what is cached where it is more than the budget, with room for more unless this is all."""
        for branch in (self._trunk, *self._branches):
            before = branch.cached
            if before is None or self._budget is None or before.vision <= self._budget:
                continue
            with self._or_as_before():
                score = self._score_of_cached(branch)
            after, done = before.merged(self._budget, rest, score)
            try:
                self._rewrite(branch, before, after, done)
            except Exception as error:
                if out_of_memory(error):  # some layers are merged and some are not: there is no way back
                    raise LightKVError("memory ran out while the cache was merged to its budget") from error
                raise

    def _rewrite(self, branch: Branch, before: Cached, after: Cached, done: Compressed) -> None:
        """Merge what the layers of a branch hold, and those of the only question with the trunk's."""
        everything = torch.arange(len(before), device=before.size.device)
        into = torch.searchsorted(done.kept, done.target)
        angles = self._layers.angles(before.positions)
        for one in (branch, *self._branches) if self._alone else (branch,):
            first = 0 if one is self._trunk else len(self._trunk.kv)
            for number, layer in enumerate(one.kv):
                if first + number in self._silent:
                    continue
                k, v, _ = layer.since(0)
                k, v = folded(k, v, angles, before.size, into, done.kept, everything)
                layer.truncate(0)
                layer.push(k, v, self._log_size(after.size))
                one.held[number] = after.vision
        branch.cached = after

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
        size, place = torch.cat(sizes).to(device), torch.arange(length, device=device)
        taken = torch.cat(positions, 1).to(device)
        return Piece(torch.cat(hidden), layout, size, taken, self._layers.angles(taken), place, (length,))

    def _prefill(self, piece: Piece) -> None:
        begun = [[len(layer) for layer in branch.kv] for branch in (self._trunk, *self._branches)]
        passage, heard = Passage(), list[Heard]()
        for number in range(self._split + 1):
            if number:
                piece = self._stage(number - 1, piece, None, [passage])
            piece, heard = self._group(number, piece, [passage], [self._trunk.kv])
        passages: list[Passage] = []
        for branches in self._together(len(piece.place)):
            passages += self._branch(piece, passage, heard, branches)
        # What several questions share cannot end as each of them would have it.
        ways = (passages[0] if self._alone else passage, *passages)
        for branch, way, marks in zip((self._trunk, *self._branches), ways, begun, strict=True):
            first = 0 if branch is self._trunk else len(self._trunk.kv)
            for number, (layer, mark) in enumerate(zip(branch.kv, marks, strict=True)):
                branch.held[number] += self._settle(first + number, layer, mark, way)
        if self._budget is not None:
            self._note_cached(self._trunk, ways[0])
            for branch, way in zip(self._branches, passages, strict=True):
                if branch.kv and not self._alone:
                    self._note_cached(branch, way)
        for branch, way in zip(self._branches, passages, strict=True):
            if self._traced and way.targets:
                branch.merges.append(self._traced_targets(way))
        self._given += passage.states[0].vision_tokens

    def _branch(self, piece: Piece, passage: Passage, heard: list[Heard], branches: list[Branch]) -> list[Passage]:
        """The groups that each question has to itself: the piece, and beside it the question as a temporary suffix."""
        passages = [passage.branched() for _ in branches]
        if self._split == len(self._config.stages):
            return passages
        caches = [self._kv(branch) for branch in branches]
        questions = self._suffixes(branches)
        # Up to the first of its stages a question has to pass all layers so far, which hold this piece already.
        hidden, said = self._beside(questions, range(self._groups[self._split].stop), caches)
        piece, heard = Piece.packed([piece] * len(branches)), heard * len(branches)
        for number in range(self._split + 1, len(self._groups)):
            score = self._score(number - 1, piece, heard, said)
            piece, heard = self._group(number, self._stage(number - 1, piece, score, passages), passages, caches)
            if self._listens(number):
                hidden, said = self._beside(replace(questions, hidden=hidden), self._groups[number], caches)
        return passages

    def _stage(self, number: int, piece: Piece, score: Tensor | None, passages: list[Passage]) -> Piece:
        """What stage `number` leaves of a piece; where the tokens went is noted in each sequence's passage."""
        stage = self._config.stages[number]
        if not bool(piece.hidden.isfinite().all()):  # what is no number has no nearest neighbour
            raise FloatingPointError(f"the hidden states before the stage after layer {stage.layer} are not finite")
        layout = piece.layout.squared() if self._config.windows == "released" else piece.layout
        columns = torch.cat([piece.positions, piece.place[None]])
        tokens = Tokens(piece.hidden, layout, piece.size, score, piece.lengths, columns)
        done = self._method.compress(tokens, stage, self._config)
        went = torch.where(done.target < 0, -1, piece.place[done.target])
        for passage, part in zip(passages, piece.parts, strict=True):
            mine = went[part]
            if passage.targets:
                before = passage.targets[-1]
                index = torch.searchsorted(piece.place[part], before.clamp(min=0))
                mine = torch.where(before < 0, -1, mine[index])
            passage.targets.append(mine)
        lengths = (len(done.kept),)
        if len(passages) > 1:
            lengths = tuple(torch.bincount(tokens.row[done.kept], minlength=len(passages)).tolist())
        cos, sin = (table.index_select(0, done.kept) for table in piece.angles)  # cheaper than computed anew
        return Piece(done.hidden, done.layout, done.size, done.columns[:-1], (cos, sin), done.columns[-1], lengths)

    def _group(
        self, number: int, piece: Piece, passages: list[Passage], caches: list[list[LayerKV]]
    ) -> tuple[Piece, list[Heard]]:
        """A piece after the layers of group `number`, whose keys and values go to each sequence's caches."""
        for passage, alone in zip(passages, piece.split(), strict=True):
            passage.states.append(alone)
        log_size, listens = self._log_size(piece.size), self._listens(number)
        heard: list[Heard] = []

        def attend_to(index: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            layers = [kv[index] for kv in caches]
            for layer, part in zip(layers, piece.parts, strict=True):
                layer.push(k[0][:, part], v[0][:, part], log_size[part])
                if listens and index == self._groups[number][-1]:
                    heard.append(Heard(q[0][:, part], k[0][:, part], scale))
            return _over(layers, q, piece, scale)

        hidden = self._layers.run(piece.hidden[None], piece.angles, self._groups[number], attend_to)[0]
        return replace(piece, hidden=hidden), heard

    def _suffixes(self, branches: list[Branch]) -> Piece:
        """The questions where each would stand if the prompt ended here."""
        device = self._layers.device
        longest = max(len(branch.question) for branch in branches)
        positions = self._positions.text(longest, taken=False).to(device)
        cos, sin = self._layers.angles(positions)
        pieces = []
        for branch in branches:
            length = len(branch.question)
            place = torch.arange(length, device=device)
            layout = VisionLayout.grids([], length).to(device)
            hidden, size = self._layers.embed(branch.question), torch.ones(length, device=device)
            angles = cos[:length], sin[:length]
            pieces.append(Piece(hidden, layout, size, positions[:, :length], angles, place, (length,)))
        return Piece.packed(pieces)

    def _beside(
        self,
        questions: Piece,
        which: range,
        caches: list[list[LayerKV]],
        tails: list[list[tuple[Tensor, Tensor]]] | None = None,
    ) -> tuple[Tensor, list[Heard]]:
        """hidden [n, D] of questions after some layers, which they leave as they were; their own KV goes to `tails`."""
        heard: list[Heard] = []

        def attend_to(index: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            seen = []
            for number, (kv, part) in enumerate(zip(caches, questions.parts, strict=True)):
                q_own, k_own, v_own = q[:, :, part], k[0][:, part], v[0][:, part]
                if index == which[-1]:
                    heard.append(Heard(q_own[0], k_own, scale))
                if tails is not None:
                    tails[number].append((k_own, v_own))
                layer, mark = kv[index], len(kv[index])  # in part the same layer for all of them
                layer.push(k_own, v_own, self._log_size(questions.size[part]))
                k_all, v_all, log_size = layer.view()
                seen.append(attend(q_own, k_all[None], v_all[None], log_size[None], None, scale))
                layer.truncate(mark)
            return torch.cat(seen, dim=1)

        return self._layers.run(questions.hidden[None], questions.angles, which, attend_to)[0], heard

    # --- what a stage wants to know ---

    def _scorer(self, stage: int) -> Scorer | None:
        return self._method.scorer(self._config, stage)

    def _listens(self, group: int) -> bool:
        """Whether the stage after this group asks for the attention of its last layer."""
        return group < len(self._config.stages) and self._scorer(group) is not None

    def _score(self, stage: int, piece: Piece, heard: list[Heard], said: list[Heard]) -> Tensor | None:
        """fp32 [n] for a piece, each sequence with its question as the text after it."""
        scorer = self._scorer(stage)
        if scorer is None:
            return None
        scores = []
        for alone, of_piece, of_question in zip(piece.split(), heard, said, strict=True):
            device, length = piece.hidden.device, len(alone.place) + of_question.q.shape[1]
            text = VisionLayout.grids([], of_question.q.shape[1]).to(device)
            layout = VisionLayout.packed([alone.layout, text])
            q = torch.cat([of_piece.q, of_question.q], dim=1)
            k = torch.cat([of_piece.k, of_question.k], dim=1)
            score = scorer(q[None], k[None], layout, Packing((length,), length, device), of_piece.scale)
            scores.append(score[: len(alone.place)])
        return torch.cat(scores)

    def _score_of_cached(self, branch: Branch) -> Tensor | None:
        """fp32 [n] for all that a branch has cached: what its question attends to, if stages ask for that.

        It is asked of the first layer that the question has to itself and that holds vision.
        """
        own = self._branches[0] if self._alone else branch
        first = len(self._trunk.kv)
        layers = [first + number for number in range(len(own.kv)) if first + number not in self._silent]
        asks = any(isinstance(self._scorer(number), QuestionAttention) for number in range(len(self._config.stages)))
        if own is self._trunk or not layers or not asks:
            return None
        assert branch.cached is not None
        kv = self._kv(own)
        _, (said,) = self._beside(self._suffixes([own]), range(layers[0] + 1), [kv])
        vision = torch.nonzero(branch.cached.place[:, 0] != TEXT).flatten()
        return QuestionAttention().of_keys(said.q, kv[layers[0]].since(0)[0], vision, said.scale)

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
            into = torch.searchsorted(final.place, way.targets[-1][here.place].clamp(min=0))
            into = torch.where(way.targets[-1][here.place] < 0, -1, into)
            k, v, _ = layer.since(mark)
            k, v = folded(k, v, here.angles, here.size, into, final.place, here.place)
            layer.truncate(mark)
            layer.push(k, v, self._log_size(final.size))
            here = final
        return here.vision_tokens

    def _note_cached(self, branch: Branch, way: Passage) -> None:
        """The tokens of the piece that are now in a branch's layers."""
        first, final = way.states[0], way.states[-1]
        features = first.hidden
        if way.targets:
            target = way.targets[-1]
            into = torch.where(target < 0, -1, torch.searchsorted(final.place, target.clamp(min=0)))
            features = mean_by_size(first.hidden[None].float(), first.size, into, len(final.place))[0].to(features)
        more = Cached(features, self._where[final.place], final.size, final.positions)
        branch.cached = more if branch.cached is None else branch.cached.after(more)

    def _traced_targets(self, way: Passage) -> list[Tensor]:
        """Per stage int64 [vision tokens of the piece]: targets in vision tokens of the prompt."""
        vision = torch.nonzero(way.states[0].layout.is_vision).flatten()
        number = torch.full_like(way.states[0].place, -1)
        number[vision] = torch.arange(len(vision), device=vision.device) + self._given
        return [torch.where(went[vision] < 0, -1, number[went[vision]]) for went in way.targets]

    @contextmanager
    def _or_as_before(self) -> Iterator[None]:
        """What fails within this scope has left nothing behind."""
        undo = self._state()
        try:
            yield
        except BaseException:
            self._restore(undo)
            raise

    def _state(self) -> Any:
        branches = [
            ([len(layer) for layer in b.kv], list(b.held), list(b.merges), b.cached)
            for b in (self._trunk, *self._branches)
        ]
        counts = self.vision_tokens, self.text_tokens, self._given, self._items
        return branches, copy.copy(self._positions.__dict__), counts

    def _restore(self, state: Any) -> None:
        branches, positions, counts = state
        self.vision_tokens, self.text_tokens, self._given, self._items = counts
        self._positions.__dict__.update(positions)
        for branch, (lengths, held, merges, cached) in zip((self._trunk, *self._branches), branches, strict=True):
            branch.held, branch.merges, branch.cached = held, merges, cached
            for layer, length in zip(branch.kv, lengths, strict=True):
                layer.truncate(length)


def _over(layers: list[LayerKV], q: Tensor, piece: Piece, scale: float) -> Tensor:
    """Causal attention of each sequence's tokens, the last of its layer, over all of them.

    q [1, Hq, n, d] → [1, n, Hq, d].
    """
    if len(layers) > 1 and sum(len(layer) for layer in layers) <= KEYS_AT_ONCE:
        return _packed([layer.view() for layer in layers], q, piece.lengths, scale)
    seen = []
    for layer, part in zip(layers, piece.parts, strict=True):
        k, v, log_size = layer.view()
        seen.append(attend(q[:, :, part], k[None], v[None], log_size[None], None, scale))
    return torch.cat(seen, dim=1)


def _packed(views: list[tuple[Tensor, Tensor, Tensor]], q: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
    """The same in one launch."""
    k, v = (torch.cat([view[side] for view in views], dim=1).transpose(0, 1) for side in (0, 1))
    keys = Keys(k, v, torch.cat([view[2] for view in views]))
    sequences = (Sequences.of(lengths, q.device), Sequences.of([len(view[2]) for view in views], q.device))
    return attend_packed(q[0].transpose(0, 1), keys, *sequences, scale)[None]
