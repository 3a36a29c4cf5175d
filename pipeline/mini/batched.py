"""The mini model's forward pass for training: a batch of equal grids; several questions share one vision prefix.

It computes what `Qwen2_5_VLForConditionalGeneration` computes from the same weights; tests compare the two. A sequence
is a `prefix` (user turn up to the last `<|vision_end|>`) and a `tail` of packed slots. A slot is one question with its
answer. It attends to the prefix and to itself, and its positions count from the prefix's end.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, Qwen2_5_VLForConditionalGeneration

from pipeline.mini.model import IMAGE_MEAN, IMAGE_STD, MERGE, PATCH_PX, TOKEN_PX
from pipeline.mini.vocabulary import IM_START, SPECIAL, VISION_END, VISION_START, words

IM_START_ID, VISION_START_ID, VISION_END_ID = (SPECIAL.index(token) for token in (IM_START, VISION_START, VISION_END))
USER_ID = len(SPECIAL) + words().index("user")
_CHUNK = 128  # queries


@dataclass(frozen=True)
class Grid:
    """`times` frame pairs of `rows` × `columns` vision tokens; `kind` is video, image or set (one image per pair)."""

    kind: str
    times: int
    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        return self.times * self.rows * self.columns


def patchify(frames: Tensor) -> Tensor:
    """uint8 [N, 2, H, W, 3] frame pairs to normalised patches in Qwen's order, float32 [N, tokens, 4, 384]."""
    n, t, height, width, channels = frames.shape
    mean, std = (torch.tensor(v, device=frames.device) for v in (IMAGE_MEAN, IMAGE_STD))
    values = frames.float() * (1 / (255 * std)) - mean / std
    gh, gw, p = height // TOKEN_PX, width // TOKEN_PX, PATCH_PX
    values = values.view(n, t, gh, MERGE, p, gw, MERGE, p, channels)
    values = values.permute(0, 2, 5, 3, 6, 8, 1, 4, 7)  # n, gh, gw, merge row, merge column, C, T, p, p
    return values.reshape(n, gh * gw, MERGE * MERGE, channels * t * p * p)


@dataclass(frozen=True)
class _Windows:
    """Vision tokens sorted so that each window is contiguous and windows of equal size follow each other."""

    order: Tensor  # [tokens] token index at each sorted index
    inverse: Tensor
    groups: tuple[tuple[int, int], ...]  # (windows, patches per window)
    cos: Tensor  # [patches, head_dim]
    sin: Tensor


@lru_cache(maxsize=64)
def _windows(rows: int, columns: int, window: int, head_dim: int, theta: float, device: torch.device) -> _Windows:
    """The window layout of a grid; `window` is a window's side in vision tokens."""
    cells = torch.arange(rows * columns).view(rows, columns)
    blocks = [
        cells[r : r + window, c : c + window].flatten()
        for r in range(0, rows, window)
        for c in range(0, columns, window)
    ]
    sizes = sorted({len(block) for block in blocks}, reverse=True)
    by_size = [[block for block in blocks if len(block) == size] for size in sizes]
    order = torch.cat([block for group in by_size for block in group])
    groups = tuple((len(group), size * MERGE**2) for group, size in zip(by_size, sizes, strict=True))
    inner = torch.arange(MERGE)
    row = ((order // columns) * MERGE)[:, None, None] + inner[:, None]
    column = ((order % columns) * MERGE)[:, None, None] + inner[None, :]
    row, column = (v.expand(-1, MERGE, MERGE).flatten().float() for v in (row, column))
    half = head_dim // 2
    inv_freq = 1.0 / theta ** (torch.arange(0, half, 2).float() / half)
    angles = torch.cat([row[:, None] * inv_freq, column[:, None] * inv_freq], -1).repeat(1, 2)
    tensors = (order, order.argsort(), angles.cos(), angles.sin())
    order, inverse, cos, sin = (v.to(device) for v in tensors)
    return _Windows(order, inverse, groups, cos, sin)


def encode_vision(model: Qwen2_5_VLForConditionalGeneration, frames: Tensor) -> Tensor:
    """uint8 [N, 2, H, W, 3] frame pairs (an image is the frame twice) to vision tokens [N, tokens, D]."""
    visual, config = model.model.visual, model.config.vision_config
    head_dim = config.hidden_size // config.num_heads
    rows, columns = frames.shape[2] // TOKEN_PX, frames.shape[3] // TOKEN_PX
    plan = _windows(rows, columns, config.window_size // TOKEN_PX, head_dim, 10000.0, frames.device)
    patches = patchify(frames)[:, plan.order].flatten(1, 2)
    hidden = patches @ visual.patch_embed.proj.weight.flatten(1).T
    n, count, width = hidden.shape
    for index, block in enumerate(visual.blocks):
        full = index in config.fullatt_block_indexes
        qkv = block.attn.qkv(_norm(hidden, block.norm1))
        qkv = qkv.view(n, count, 3, config.num_heads, head_dim).permute(2, 0, 3, 1, 4)  # 3, N, heads, patches, d
        q, k = _rotate(qkv[:2], plan.cos, plan.sin).unbind(0)
        mixed = _window_attention(q, k, qkv[2], ((1, count),) if full else plan.groups)
        hidden = hidden + block.attn.proj(mixed.transpose(1, 2).reshape(n, count, width))
        hidden = hidden + block.mlp(_norm(hidden, block.norm2))
    merged = _norm(hidden, visual.merger.ln_q).view(n, count // MERGE**2, -1)
    return visual.merger.mlp(merged)[:, plan.inverse]


def _window_attention(q: Tensor, k: Tensor, v: Tensor, groups: tuple[tuple[int, int], ...]) -> Tensor:
    """Attention [N, heads, patches, d] inside each window only."""
    outputs, start = [], 0
    for windows, size in groups:
        stop = start + windows * size
        a, b, c = (x[:, :, start:stop].unflatten(2, (windows, size)) for x in (q, k, v))
        weights = (a * a.shape[-1] ** -0.5 @ b.transpose(-1, -2)).softmax(-1)
        outputs.append((weights @ c).flatten(2, 3))
        start = stop
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)


def _norm(x: Tensor, module: Any) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


@cache
def prefix_layout(grid: Grid, pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids [P] and positions (time, row, column) [3, P] of the user turn up to its last `<|vision_end|>`."""
    ids: list[int] = [IM_START_ID, USER_ID]
    positions = [torch.arange(2).expand(3, -1)]
    next_position = 2
    items, times = (grid.times, 1) if grid.kind == "set" else (1, grid.times)
    for _ in range(items):
        ids += [VISION_START_ID, *[pad_id] * (times * grid.rows * grid.columns), VISION_END_ID]
        axes = (torch.arange(times), torch.arange(grid.rows), torch.arange(grid.columns))
        block = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1) + next_position + 1
        after = next_position + 1 + max(grid.rows, grid.columns)
        positions += [torch.full((3, 1), next_position), block, torch.full((3, 1), after)]
        next_position = after + 1
    return torch.tensor(ids), torch.cat(positions, 1)


@dataclass(frozen=True)
class Output:
    """`vision` [B, tokens, D] as encoded, `middle` the same tokens halfway through the text model, `tail` [B, L, D]."""

    vision: Tensor
    middle: Tensor
    tail: Tensor


def forward(
    model: Qwen2_5_VLForConditionalGeneration,
    frames: Tensor,
    grid: Grid,
    tail_ids: Tensor,
    tail_offset: Tensor,
    tail_slot: Tensor,
) -> Output:
    """Run the model. Frames: uint8 [B, times, 2, H, W, 3]. Tail ids, offset in the slot and slot number: int64 [B, L].

    Slot number −1 marks padding.
    """
    text, config = model.model.language_model, model.config.text_config
    pad_id = model.config.video_token_id if grid.kind == "video" else model.config.image_token_id
    ids, positions = (v.to(frames.device) for v in prefix_layout(grid, pad_id))
    batch, length = len(frames), len(ids)
    vision = encode_vision(model, frames.flatten(0, 1)).reshape(batch, grid.tokens, -1)
    is_vision = ids == pad_id
    prefix = text.embed_tokens(ids).expand(batch, -1, -1).clone()
    prefix[:, is_vision] = vision.to(prefix.dtype)
    tail = text.embed_tokens(tail_ids)

    prefix_rope = _text_rope(positions[:, None], config)
    tail_rope = _text_rope((positions.max(1).values.max() + 1 + tail_offset).expand(3, -1, -1), config)
    causal = torch.full((_CHUNK, _CHUNK), float("-inf"), device=frames.device).triu(1)
    same = tail_slot[:, :, None] == tail_slot[:, None, :]
    same = same & torch.ones(same.shape[1:], dtype=torch.bool, device=frames.device).tril()
    own = torch.zeros(same.shape, device=frames.device).masked_fill(~same, float("-inf"))
    tail_mask = F.pad(own, (length, 0))[:, None, None]  # [B, 1, 1, L, P + L]

    middle = vision
    for index, layer in enumerate(text.layers):
        attention, last = layer.self_attn, index == len(text.layers) - 1
        x, y = _norm(prefix, layer.input_layernorm), _norm(tail, layer.input_layernorm)
        heads = (-1, attention.head_dim)
        kp = _rotate(attention.k_proj(x).unflatten(-1, heads).transpose(1, 2), *prefix_rope)
        vp = attention.v_proj(x).unflatten(-1, heads).transpose(1, 2)
        kt = _rotate(attention.k_proj(y).unflatten(-1, heads).transpose(1, 2), *tail_rope)
        vt = attention.v_proj(y).unflatten(-1, heads).transpose(1, 2)
        qt = _rotate(attention.q_proj(y).unflatten(-1, heads).transpose(1, 2), *tail_rope)
        mixed = _grouped_attention(qt, torch.cat((kp, kt), 2), torch.cat((vp, vt), 2), tail_mask)
        tail = tail + attention.o_proj(mixed)
        tail = tail + layer.mlp(_norm(tail, layer.post_attention_layernorm))
        if not last:  # after the last layer the prefix is not used
            qp = _rotate(attention.q_proj(x).unflatten(-1, heads).transpose(1, 2), *prefix_rope)
            prefix = prefix + attention.o_proj(_causal_attention(qp, kp, vp, causal))
            prefix = prefix + layer.mlp(_norm(prefix, layer.post_attention_layernorm))
        if index == len(text.layers) // 2 - 1:
            middle = prefix[:, is_vision]
    return Output(vision, middle, _norm(tail, text.norm))


def _text_rope(positions: Tensor, config: PreTrainedConfig) -> tuple[Tensor, Tensor]:
    """cos and sin [B, 1, S, head_dim] of multimodal positions [3, B, S]; `mrope_section` assigns dims to the axes."""
    rope, head_dim = config.rope_parameters, config.hidden_size // config.num_attention_heads
    steps = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = positions[..., None].float() * (1.0 / rope["rope_theta"] ** steps)  # [3, B, S, head_dim / 2]
    parts = angles.split(rope["mrope_section"], -1)
    mixed = torch.cat([part[i % 3] for i, part in enumerate(parts)], -1).repeat(1, 1, 2)[:, None]
    return mixed.cos(), mixed.sin()


def _causal_attention(q: Tensor, k: Tensor, v: Tensor, corner: Tensor) -> Tensor:
    """Causal attention in chunks of queries, so that most of the masked half is never computed."""
    outputs = []
    for start in range(0, q.shape[2], _CHUNK):
        stop = min(start + _CHUNK, q.shape[2])
        mask = F.pad(corner[: stop - start, : stop - start], (start, 0))
        outputs.append(_grouped_attention(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], mask))
    return torch.cat(outputs, 1)


def _grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q [B, Hq, L, d] over k, v [B, Hkv, S, d] with an additive mask that broadcasts to [B, Hkv, Hq/Hkv, L, S]."""
    batch, heads, length, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    grouped = q.reshape(batch, kv_heads, -1, dim)  # neighbouring query heads share a KV head
    scores = (grouped * dim**-0.5 @ k.transpose(-1, -2)).view(batch, kv_heads, heads // kv_heads, length, keys)
    weights = (scores + mask).softmax(-1).view(batch, kv_heads, -1, keys)
    mixed = (weights @ v).view(batch, heads, length, dim)
    return mixed.transpose(1, 2).reshape(batch, length, heads * dim)


def logits(model: Qwen2_5_VLForConditionalGeneration, hidden: Tensor) -> Tensor:
    return hidden @ model.lm_head.weight.T
