"""Reference implementations: compressed generation (dense masks, no cache, no hooks) and spacetime merging by loops."""

import math
from dataclasses import dataclass
from operator import mul

import torch
from torch import Tensor

from lightkv import Tokens, prompt_guidance
from lightkv.methods.guidance import GUIDANCES
from lightkv.methods.table import METHODS


@dataclass
class Prompt:
    """The decoder's inputs for one prompt: embeds [1, S, D], RoPE positions [1, S] or [3, 1, S], the layout."""

    embeds: Tensor
    positions: Tensor
    layout: object


def prompt_of(model, sample):
    """Records the decoder's inputs in a plain forward."""
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
    size, proportional = torch.ones(length), METHODS[config.method].proportional
    for index, layer in enumerate([None, *decoder.layers], start=-1):
        score, total = None, x.shape[1]
        if layer is not None:
            before, angles = x, decoder.rotary_emb(x, positions)
            mask = torch.full((total, total), torch.finfo(x.dtype).min).triu(1)[None, None]
            if proportional:
                mask = mask + torch.cat([size, torch.ones(count)]).log()
            x = layer(x, attention_mask=mask, position_embeddings=angles)
        if index not in drops:
            continue
        stage = drops[index]
        if layer is not None:
            seen = [angle[..., :length, :] for angle in angles]
            score = score_of(config, stage == config.stages[0], layer, before[:, :length], seen, layout)
        head = layout.squared() if config.windows == "released" else layout
        result = METHODS[config.method].compress(Tokens(x[0, :length], head, size, score), stage, config)
        size = result.size
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


def score_of(config, first, layer, hidden, angles, layout):
    """The scores of the stage after `layer`, fp32 [S] or None: votes of the prompt, or attention of its end."""
    q, k, scale = queries_and_keys(layer, hidden, angles)
    if config.method in ("lightkv", "asked") and not first:
        scores = q @ k.repeat_interleave(len(q) // len(k), 0).transpose(1, 2) * scale
        scores = scores.masked_fill(layout.is_text, -torch.inf).softmax(-1)
        after = int(torch.nonzero(layout.is_vision).max()) + 1
        return scores[:, after:].amax(dim=(0, 1))
    if config.method == "fastv":
        scores = q @ k.repeat_interleave(len(q) // len(k), 0).transpose(1, 2) * scale
        return (
            scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
            .softmax(-1)[:, -1]
            .mean(0)
        )
    if config.method != "published":
        return None
    voters = GUIDANCES[config.guidance].voters(layout)
    return torch.ones(len(layout)) if voters is None else prompt_guidance(q, k, voters, scale)


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


def spacetime(hidden, size, layout, drop, rounds, distance, limit):
    """Spacetime merging, token by token in fp64 → (hidden, kept, target, size) of the survivors as lists."""
    x, n, target = [row.double() for row in hidden], size.tolist(), list(range(len(layout)))
    place = list(zip(*(getattr(layout, name).tolist() for name in "tyx"), strict=True))

    def apart(a, b):
        (ta, ya, xa), (tb, yb, xb) = place[a], place[b]
        return math.sqrt((ta - tb) ** 2 / 4 + (ya - yb) ** 2 + (xa - xb) ** 2)

    def ranks(i, alive):
        """For each axis: the rank of i among the alive tokens of its row, which share the other two coordinates."""
        rows = (
            [j for j in alive if place[j][:axis] + place[j][axis + 1 :] == place[i][:axis] + place[i][axis + 1 :]]
            for axis in range(3)
        )
        return [sum((place[j][axis], j) < (place[i][axis], i) for j in row) for axis, row in enumerate(rows)]

    for item in sorted(set(layout.item[layout.mergeable].tolist())):
        alive = [i for i in range(len(layout)) if layout.item[i] == item]
        wanted = min(math.floor(len(alive) * drop + 1e-9), len(alive) - 1)
        scale = sum(float(x[i] @ x[i]) for i in alive) / len(alive) or 1.0
        done, number = 0, 0

        def differ(a, b, scale=scale):
            return float((x[a] - x[b]) @ (x[a] - x[b])) / (2 * scale) + distance * apart(a, b)

        while done < wanted:
            share = wanted * min(number + 1, rounds) // rounds - done
            found = []
            for block in halved(alive, place, limit):
                counted = ((1, 1, 1), (1, 0, 0), (1, 1, 0), (1, 0, 1))[number % 4]
                a_set = [i for i in block if (sum(map(mul, counted, ranks(i, alive))) + number) % 2 == 0]
                b_set = [i for i in block if i not in a_set]
                if not a_set or not b_set:
                    a_set, b_set = block[number % 2 :: 2], block[1 - number % 2 :: 2]
                if not b_set:
                    continue
                for a in a_set:
                    least, b = min((differ(a, b), b) for b in b_set)
                    found.append((least * n[a] * n[b] / (n[a] + n[b]), a, b))
            merges = sorted(found)[:share]
            for b in {b for _, _, b in merges}:
                members = [a for _, a, into in merges if into == b]
                total = n[b] + sum(n[a] for a in members)
                x[b] = (n[b] * x[b] + sum(n[a] * x[a] for a in members)) / total
                n[b] = total
                target = [b if now in members else now for now in target]
                alive = [i for i in alive if i not in members]
            done, number = done + len(merges), number + 1
    kept = [i for i in range(len(layout)) if target[i] == i]
    return [x[i].tolist() for i in kept], kept, target, [n[i] for i in kept]


def halved(tokens, place, limit):
    """Blocks of at most `limit` tokens, halved by count along the longest axis; a frame counts as half a step."""
    if len(tokens) <= limit:
        return [tokens]
    extents = [
        weight * (max(place[i][axis] for i in tokens) - min(place[i][axis] for i in tokens))
        for axis, weight in enumerate((1, 2, 2))
    ]
    axis = extents.index(max(extents))
    along = sorted(tokens, key=lambda i: (place[i][axis], i))
    middle = len(tokens) // 2
    return [*halved(sorted(along[:middle]), place, limit), *halved(sorted(along[middle:]), place, limit)]
