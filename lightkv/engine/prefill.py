"""Streaming prefill: a prompt runs through the decoder piece by piece, and each piece is compressed on the way.

A piece is some images, some seconds of a video, and the text around them. It runs through the layers group by group,
with a stage between two groups, and attends to what earlier pieces left in each layer's cache. If a stage depends on
the question's attention, the question runs through the layers before it as a temporary suffix and leaves nothing in the
cache. After the last piece, the question itself follows. Memory: the compressed cache and one piece.

Several questions share everything up to the first stage that depends on the question; after it each question has layers
of its own (branches.py). If no stage depends on the question, all questions share the cache of the whole prompt; only
the question's own tokens are separate.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lightkv.engine.branches import Branch, PromptCaches
from lightkv.engine.forward import run_piece, run_questions
from lightkv.engine.layerkv import Bits, LayerKV
from lightkv.engine.layers import Layers
from lightkv.engine.piece import History, LayerQK, Piece, PromptInput
from lightkv.engine.positions import Positions
from lightkv.engine.segments import Segment
from lightkv.engine.stages import Stages
from lightkv.errors import LightKVError, out_of_memory
from lightkv.methods.config import LightKVConfig
from lightkv.methods.guidance import QuestionAttention
from lightkv.vision.layout import TEXT


@dataclass(frozen=True)
class Prefilled:
    """One question, ready for decoding.

    kv, tail   per layer: the prompt's cache (in part shared with the other questions), and the question's k, v
               [Hkv, T, d]
    first      fp32 [V]: logits of the answer's first token
    position   of that token
    held       vision tokens in each layer
    merges     per stage int64 [V]: the vision token of the prompt that each is merged into by then; -1: dropped
    """

    kv: list[LayerKV]
    tail: list[tuple[Tensor, Tensor]]
    first: Tensor
    position: int
    held: tuple[int, ...]
    merges: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its cache, shared parts counted in full."""
        return sum(layer.nbytes for layer in self.kv) + sum(k.nbytes + v.nbytes for k, v in self.tail)


class Stream:
    """Prefills one prompt: `take` its pieces in order, then `finish`.

    fold     after each piece, all layers keep what the last stage left of it (fold.py); layers shared by several
             questions keep what the shared stages left
    silent   layers that keep no vision of a finished piece: later pieces and questions do not attend to it there
    budget   most vision tokens in a layer's cache, before the piece in progress is added (budget.py); needs fold
    traced   record which vision token each was merged into; not under a budget
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
        self._layers, self._budget, self._traced = layers, budget, traced and budget is None
        self._stages = Stages(config, len(layers))
        self.input = PromptInput(layers, positions)
        questions = [question.to(layers.device) for question in questions]
        self._caches = PromptCaches(questions, self._stages, len(layers), bits, fold, silent)

    @property
    def nbytes(self) -> int:
        """Bytes of all caches of this prompt."""
        return self._caches.nbytes

    @torch.no_grad()
    def take(self, segments: Sequence[Segment]) -> None:
        """Prefill the next piece of the prompt. If that fails, the prompt is as it was before."""
        self._merge_to_budget()
        if self._budget is None:
            self._caches.seal()
        with self._undone_on_failure():
            self._prefill(segments)

    @torch.no_grad()
    def finish(self) -> list[Prefilled]:
        """Prefill the questions, each after the whole prompt."""
        self._merge_to_budget(rest=True)
        self._caches.seal(rest=True)
        everything = range(len(self._layers))
        prefilled = []
        for branches in self._caches.batches():
            caches = [self._caches.kv(branch) for branch in branches]
            tails: list[list[tuple[Tensor, Tensor]]] = [[] for _ in branches]
            questions, _ = run_questions(self._layers, everything, self._questions(branches), caches, tails)
            for branch, kv, tail, part in zip(branches, caches, tails, questions.parts, strict=True):
                position = int(questions.positions[0, part.stop - 1]) + 1
                first = self._layers.logits(questions.hidden[part.stop - 1])
                merges = tuple(torch.cat(parts) for parts in zip(*branch.merges, strict=True))
                held = (*self._caches.trunk.held, *branch.held)
                prefilled.append(Prefilled(kv, tail, first, position, held, merges))
        return prefilled

    def _prefill(self, segments: Sequence[Segment]) -> None:
        """Run a piece through all layers, then reduce it in each layer to what the layer keeps."""
        encoded_before = self.input.encoded_tokens
        piece, coordinates = self.input.piece(segments)
        marks = self._caches.lengths()
        trunk, piece_qk = History(), list[LayerQK]()
        for group in range(self._stages.shared_groups):
            if group:
                piece = self._stages.compress(group - 1, piece, None, [trunk])
            piece, piece_qk = self._run_group(group, piece, [trunk], [self._caches.trunk.kv])
        histories: list[History] = []
        for branches in self._caches.batches(len(piece.place)):
            histories += self._run_branches(piece, trunk, piece_qk, branches)
        # Layers shared by several questions keep what the shared stages left: later stages differ per question.
        shared = histories[0] if self._caches.uniform else trunk
        self._caches.settle(marks, shared, histories)
        if self._budget is not None:
            self._caches.note_cached(shared, histories, coordinates)
        for branch, history in zip(self._caches.branches, histories, strict=True):
            if self._traced and history.targets:
                branch.merges.append(history.vision_targets(encoded_before))

    def _run_branches(
        self, piece: Piece, trunk: History, piece_qk: list[LayerQK], branches: list[Branch]
    ) -> list[History]:
        """Run a piece through the layers of some branches, with each question as its temporary suffix."""
        histories = [trunk.copy() for _ in branches]
        own_groups = range(self._stages.shared_groups, len(self._stages.groups))
        if not own_groups:
            return histories
        caches = [self._caches.kv(branch) for branch in branches]
        # The questions run through the shared layers too, whose caches hold this piece already.
        shared_layers = self._stages.shared_layers
        questions, question_qk = run_questions(self._layers, shared_layers, self._questions(branches), caches)
        piece, piece_qk = Piece.packed([piece] * len(branches)), piece_qk * len(branches)
        for group in own_groups:
            score = self._stages.score(group - 1, piece, piece_qk, question_qk)
            piece = self._stages.compress(group - 1, piece, score, histories)
            piece, piece_qk = self._run_group(group, piece, histories, caches)
            if self._stages.needs_qk(group):
                questions, question_qk = run_questions(self._layers, self._stages.groups[group], questions, caches)
        return histories

    def _run_group(
        self, group: int, piece: Piece, histories: list[History], caches: list[list[LayerKV]]
    ) -> tuple[Piece, list[LayerQK]]:
        """A piece after the layers of a group; its state before them goes to each sequence's history."""
        for history, sequence in zip(histories, piece.split(), strict=True):
            history.states.append(sequence)
        log_size, needs_qk = self._stages.log_size(piece.size), self._stages.needs_qk(group)
        return run_piece(self._layers, self._stages.groups[group], piece, caches, log_size, needs_qk)

    def _questions(self, branches: Sequence[Branch]) -> Piece:
        return self.input.questions([branch.question for branch in branches])

    def _merge_to_budget(self, rest: bool = False) -> None:
        """Merge the caches that exceed the budget; unless this is the end (`rest`), to less, so that more fits."""
        for branch in self._caches:
            before = branch.cached
            if before is None or self._budget is None or before.vision <= self._budget:
                continue
            with self._undone_on_failure():
                score = self._score_cached(branch)
            after, done = before.merged(self._budget, rest, score)
            try:
                self._caches.merge(branch, before, after, done, self._layers.angles(before.positions))
            except Exception as error:
                if out_of_memory(error):  # some layers are merged and some are not: this cannot be undone
                    raise LightKVError("memory ran out while the cache was merged to its budget") from error
                raise

    def _score_cached(self, branch: Branch) -> Tensor | None:
        """fp32 [n]: the question's attention to each cached token of a branch; None if no stage uses it.

        It is measured in the question's first layer of its own that is not silent.
        """
        own = self._caches.branches[0] if self._caches.uniform else branch
        layers = self._caches.vision_layers(own)
        if own is self._caches.trunk or not layers or not self._stages.uses_question_attention:
            return None
        assert branch.cached is not None
        kv = self._caches.kv(own)
        _, (qk,) = run_questions(self._layers, range(layers[0] + 1), self._questions([own]), [kv])
        vision = torch.nonzero(branch.cached.place[:, 0] != TEXT).flatten()
        return QuestionAttention().of_keys(qk.q, kv[layers[0]].since(0)[0], vision, qk.scale)

    @contextmanager
    def _undone_on_failure(self) -> Iterator[None]:
        """Restores the prompt's counts, positions and caches if the scope raises."""
        counts, caches = self.input.state(), self._caches.state()
        try:
            yield
        except BaseException:
            self.input.restore(counts)
            self._caches.restore(caches)
            raise
