"""The stages of a configuration, and the groups of layers between them."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lightkv.engine.piece import History, LayerQK, Piece
from lightkv.methods.config import LightKVConfig
from lightkv.methods.guidance import QuestionAttention, Scorer
from lightkv.methods.table import METHODS
from lightkv.vision.layout import VisionLayout
from lightkv.vision.packing import Packing
from lightkv.vision.tokens import Tokens

# Uncompressed, but repeated frames still count with their size in attention.
NO_STAGES = LightKVConfig((), method="spacetime")


class Stages:
    """Compresses pieces between the groups of layers; stage i lies between groups i and i + 1.

    groups         the layers of each group
    shared_groups  the first groups, which all questions share: the stage after them is the first that depends on the
                   question
    """

    def __init__(self, config: LightKVConfig | None, depth: int) -> None:
        self._config = NO_STAGES if config is None else config
        self._method = METHODS[self._config.method]
        bounds = [0, *(stage.layer + 1 for stage in self._config.stages), depth]
        self.groups = [range(*bound) for bound in pairwise(bounds)]
        stages = len(self._config.stages)
        self.shared_groups = 1 + next((stage for stage in range(stages) if self._scorer(stage) is not None), stages)

    @property
    def shared_layers(self) -> range:
        """The layers that all questions share."""
        return range(self.groups[self.shared_groups - 1].stop)

    @property
    def uses_question_attention(self) -> bool:
        """Whether any stage scores tokens by the question's attention to them."""
        return any(isinstance(self._scorer(stage), QuestionAttention) for stage in range(len(self._config.stages)))

    def needs_qk(self, group: int) -> bool:
        """Whether the stage after this group scores tokens by queries and keys of the group's last layer."""
        return group < len(self._config.stages) and self._scorer(group) is not None

    def log_size(self, size: Tensor) -> Tensor:
        """What a token's size adds to the attention scores of its key."""
        return size.log() if self._method.proportional else torch.zeros_like(size)

    def compress(self, stage: int, piece: Piece, score: Tensor | None, histories: Sequence[History]) -> Piece:
        """The piece after a stage; appends each sequence's targets to its history.

        Raises FloatingPointError for hidden states that are not finite.
        """
        settings = self._config.stages[stage]
        if not bool(piece.hidden.isfinite().all()):  # NaN has no nearest neighbour
            raise FloatingPointError(f"the hidden states before the stage after layer {settings.layer} are not finite")
        layout = piece.layout.squared() if self._config.windows == "released" else piece.layout
        columns = torch.cat([piece.positions, piece.place[None]])
        tokens = Tokens(piece.hidden, layout, piece.size, score, piece.lengths, columns)
        done = self._method.compress(tokens, settings, self._config)
        targets = torch.where(done.target < 0, -1, piece.place[done.target])
        for history, part in zip(histories, piece.parts, strict=True):
            target = targets[part]
            if history.targets:
                before = history.targets[-1]
                index = torch.searchsorted(piece.place[part], before.clamp(min=0))
                target = torch.where(before < 0, -1, target[index])
            history.targets.append(target)
        lengths = (len(done.kept),)
        if len(histories) > 1:
            lengths = tuple(torch.bincount(tokens.row[done.kept], minlength=len(histories)).tolist())
        cos, sin = (table.index_select(0, done.kept) for table in piece.angles)  # cheaper than computing them again
        return Piece(done.hidden, done.layout, done.size, done.columns[:-1], (cos, sin), done.columns[-1], lengths)

    def score(
        self, stage: int, piece: Piece, piece_qk: Sequence[LayerQK], question_qk: Sequence[LayerQK]
    ) -> Tensor | None:
        """fp32 [n] for a piece's tokens, each sequence followed by its question as text; None for unscored stages."""
        scorer = self._scorer(stage)
        if scorer is None:
            return None
        scores = []
        for sequence, own, question in zip(piece.split(), piece_qk, question_qk, strict=True):
            device, length = piece.hidden.device, len(sequence.place) + question.q.shape[1]
            text = VisionLayout.grids([], question.q.shape[1]).to(device)
            layout = VisionLayout.packed([sequence.layout, text])
            q, k = torch.cat([own.q, question.q], dim=1), torch.cat([own.k, question.k], dim=1)
            score = scorer(q[None], k[None], layout, Packing((length,), length, device), own.scale)
            scores.append(score[: len(sequence.place)])
        return torch.cat(scores)

    def _scorer(self, stage: int) -> Scorer | None:
        return self._method.scorer(self._config, stage)
