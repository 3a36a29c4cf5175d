"""Runs some decoder layers of a stock model with the caller's own attention.

transformers selects attention by name. Under ours, a layer passes q, k (after RoPE) and v to the callback given to
`run`, which attends to them and to its own cache. transformers' cache and masks are not used.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lightkv.errors import UnsupportedModelError
from lightkv.vision.families import check_attention

Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]
"""(layer, q [B, Hq, S, d], k and v [B, Hkv, S, d] of the new tokens, scale) → [B, S, Hq, d]."""

NAME = "lightkv_engine"
_RUNNING: WeakKeyDictionary[nn.Module, tuple[int, Attend]] = WeakKeyDictionary()


class Layers:
    """The decoder of a model, layer by layer. Raises UnsupportedModelError for attention that it cannot replace.

    compiled   steps of one token run through torch.compile, except attention
    """

    def __init__(self, model: PreTrainedModel, compiled: bool = False) -> None:
        self._decoder = model.get_decoder()
        self._head = model.get_output_embeddings()
        self._config = self._decoder.config
        check_attention(self._decoder)
        check_angles(self._decoder)
        if NAME not in ALL_ATTENTION_FUNCTIONS:
            AttentionInterface.register(NAME, _attend)
        self._step = _forward
        if compiled:
            AttentionInterface.register(NAME, torch.compiler.disable(_attend))
            self._step = torch.compile(_forward, dynamic=True)

    def __len__(self) -> int:
        return len(self._decoder.layers)

    @property
    def device(self) -> torch.device:
        return self._decoder.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._decoder.embed_tokens.weight.dtype

    @property
    def head_dims(self) -> int:
        dims = getattr(self._config, "head_dim", None)
        return dims or self._config.hidden_size // self._config.num_attention_heads

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [...] → [..., D]."""
        return self._decoder.embed_tokens(ids.to(self.device))

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [n, d] of positions int64 [axes, n]."""
        place = positions[:, None] if len(positions) > 1 else positions
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        cos, sin = self._decoder.rotary_emb(like, place.to(self.device))
        return cos[0], sin[0]

    def run(self, hidden: Tensor, angles: tuple[Tensor, Tensor], which: range, attend: Attend) -> Tensor:
        """hidden [B, S, D] after the layers `which`; angles: cos and sin of the B · S tokens."""
        cos, sin = (table.view(*hidden.shape[:2], -1) for table in angles)
        forward = self._step if hidden.shape[1] == 1 else _forward
        for index in which:
            layer = self._decoder.layers[index]
            _RUNNING[layer.self_attn] = (index, attend)
            try:
                result = forward(layer, hidden, (cos, sin))
                if layer.self_attn in _RUNNING:
                    raise UnsupportedModelError(f"layer {index} did not run its attention through AttentionInterface")
            finally:
                _RUNNING.pop(layer.self_attn, None)
            hidden = result[0] if isinstance(result, tuple) else result
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits [..., V] of hidden [..., D] after the last layer."""
        return self._head(self._decoder.norm(hidden)).float()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within this scope the model uses the attention of `run`; on exit its own is restored."""
        before = self._config._attn_implementation
        self._config._attn_implementation = NAME
        try:
            yield
        finally:
            self._config._attn_implementation = before


def _forward(layer: nn.Module, hidden: Tensor, angles: tuple[Tensor, Tensor]) -> Any:
    return layer(hidden, attention_mask=None, position_embeddings=angles, position_ids=None)


def check_angles(decoder: Any) -> None:
    """Raises UnsupportedModelError if the RoPE angles of cached keys depend on the final length of the prompt."""
    rope = (getattr(decoder.config, "rope_parameters", None) or {}).get("rope_type")
    if rope in ("dynamic", "longrope"):
        raise UnsupportedModelError(
            f"{rope} RoPE is not supported: its angles depend on the final length of the prompt"
        )


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    index, attend = _RUNNING.pop(module)
    if kwargs.get("s_aux") is not None or any(kwargs.get(name) for name in ("softcap", "sliding_window")):
        raise UnsupportedModelError("attention with sinks, soft caps or windows is not supported here")
    given = kwargs.get("scaling")
    return attend(index, query, key, value, query.shape[-1] ** -0.5 if given is None else given), None
