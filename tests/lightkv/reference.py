"""A whole compressed generation by hand: dense masks, no cache, no hooks; layers of the model called one by one."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightkv import compress_tokens, prompt_guidance
from lightkv.guidance import GUIDANCES


@dataclass
class Prompt:
    """What the decoder receives for one prompt: embeds [1, S, D], RoPE positions [1, S] or [3, 1, S], the layout."""

    embeds: Tensor
    positions: Tensor
    layout: object


def prompt_of(model, sample):
    """Look at a plain forward to learn what reaches the decoder."""
    seen = {}
    handle = model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        model.generate(**sample, max_new_tokens=1, do_sample=False)
    handle.remove()
    embeds, positions = seen["inputs_embeds"], seen.get("position_ids")
    if positions is None:
        positions = torch.arange(embeds.shape[1])[None]
    return embeds, positions[1:] if positions.ndim == 3 and len(positions) == 4 else positions


@torch.no_grad()
def logits(model, prompt, config, generated):
    """Logits that predict each of `generated` (int64 [N]) and the token after it, [N + 1, V]."""
    decoder, length, count = model.get_decoder(), prompt.embeds.shape[1], len(generated)
    tail = model.get_input_embeddings()(generated)[None]
    x = torch.cat([prompt.embeds, tail], dim=1)
    later = prompt.positions[..., -1:] + 1 + torch.arange(count)
    positions = torch.cat([prompt.positions, later], dim=-1)
    layout, drops = prompt.layout, {stage.layer: stage for stage in config.stages}
    for index, layer in enumerate(decoder.layers):
        before, angles = x, decoder.rotary_emb(x, positions)
        total = x.shape[1]
        mask = torch.full((total, total), torch.finfo(x.dtype).min).triu(1)[None, None]
        x = layer(x, attention_mask=mask, position_embeddings=angles)
        if index not in drops:
            continue
        stage = drops[index]
        q, k, scale = queries_and_keys(layer, before, angles)
        voters = GUIDANCES[config.guidance].voters(layout)
        head = layout.squared() if config.windows == "released" else layout
        guidance = (
            torch.ones(length) if voters is None else prompt_guidance(q[:, :length], k[:, :length], voters, scale)
        )
        result = compress_tokens(
            x[0, :length],
            guidance,
            head,
            windows=stage.windows,
            drop=stage.drop,
            frames=config.frames_per_window,
        )
        x = torch.cat([result.hidden[None], x[:, length:]], dim=1)
        stay = torch.cat([result.kept, torch.arange(length, total)])
        kept_positions = positions[..., stay]
        if config.positions == "compact":
            gone = sorted(
                set(positions[..., :length].flatten().tolist()) - set(positions[..., result.kept].flatten().tolist())
            )
            kept_positions = kept_positions - torch.tensor(
                [sum(value < p for value in gone) for p in kept_positions.flatten().tolist()]
            ).reshape(kept_positions.shape)
        positions, layout, length = kept_positions, head.take(result.kept), len(result.kept)
    return model.lm_head(decoder.norm(x))[0, length - 1 :]


def queries_and_keys(layer, hidden, angles):
    """q [Hq, S, d] and k [Hkv, S, d] after RoPE, and the score scale, of a Llama- or Qwen-like layer."""
    attention = layer.self_attn
    states = layer.input_layernorm(hidden)
    shape = (*states.shape[:2], -1, attention.head_dim)
    q, k = attention.q_proj(states).view(shape), attention.k_proj(states).view(shape)
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    cos, sin = (angle[0, :, None] for angle in angles)
    q, k = q[0] * cos + half_turned(q[0]) * sin, k[0] * cos + half_turned(k[0]) * sin
    return q.transpose(0, 1), k.transpose(0, 1), attention.scaling


def half_turned(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
