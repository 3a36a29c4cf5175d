"""Compresses the prefills of a stock model inside a `with` block, the scope; all hooks are removed when it ends.

    with compress(model, LightKVConfig.for_model(model.config)) as report:
        model.generate(**inputs)

How it works. A stage "after layer l" runs in a pre-hook of layer l + 1, on the output of layer l. A registered
attention implementation passes it layer l's queries and keys. All later layers get the shorter hidden states, the
survivors' RoPE positions and a causal mask sized by their own cache, in prefill and in decode steps. For methods with
proportional attention, they also add the log of the tokens' sizes to the scores.

Layers up to l keep the full cache, so `generate` continues to count from the original length. After a stage on the
embeddings (layer -1) no layer holds the full cache, so layer 0's cache reports the original length (cache.py).

Prompts as embeddings (vision encoded elsewhere, for example chunk by chunk). Qwen-VL also needs `input_ids` with the
placeholders, because `generate` derives the 3-D positions from them (without them it silently counts 0, 1, 2, … on all
three axes). The layouts come from the same grids:

    model.generate(input_ids=ids, inputs_embeds=embeds, attention_mask=mask,
                   mm_token_type_ids=types, video_grid_thw=grid)             # types: 0 text, 1 image, 2 video

Qwen3-VL also adds vision features inside its first layers, which embeddings do not contain: pass pixels, or the
encoder's outputs as `mm_encoder_outputs={"video": …}` instead of `inputs_embeds`.

Models with ordinary RoPE need only `layouts` (one VisionLayout per prompt, without padding), no ids:

    with compress(model, config, layouts=[VisionLayout.grids([(start, t, h, w)], length)]) as report:
        model.generate(inputs_embeds=embeds, attention_mask=mask)
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.masking_utils import create_causal_mask

from lightkv.errors import LightKVError, UnsupportedCallError, UnsupportedModelError
from lightkv.hooks.attention import EXTRA_DIMS, FLASH_DIMS, HOOKS, AttentionHook, KeyWeights, hooked
from lightkv.hooks.cache import cache_holding, held_tokens, put_short_layer
from lightkv.hooks.prefill import Prefill, rows_for_batch
from lightkv.hooks.refusals import refuse_cache, refuse_generation, refuse_reuse, seen_tokens
from lightkv.hooks.report import Report
from lightkv.methods.config import LightKVConfig
from lightkv.methods.table import METHODS
from lightkv.ops.dispatch import use_triton
from lightkv.vision.families import EMBEDDINGS, FAMILIES, check_attention, family_of, first_stage_layer
from lightkv.vision.layout import VisionLayout

ATTACHED: WeakSet[nn.Module] = WeakSet()


@contextmanager
def compress(
    model: PreTrainedModel, config: LightKVConfig, layouts: Sequence[VisionLayout] | None = None
) -> Iterator[Report]:
    """Compresses the vision tokens of every prefill of `model` inside the scope; yields the Report.

    `layouts` (one VisionLayout per prompt, without padding) replaces the layouts derived from `input_ids`.
    Raises UnsupportedModelError or ConfigError on entry. Unsupported calls of the model raise UnsupportedCallError.
    """
    session = _Session(model, config, layouts)
    with ExitStack() as undo:
        session.attach(undo)
        yield session.report


class _Session:
    """The hooks of one scope and their shared state."""

    def __init__(self, model: PreTrainedModel, config: LightKVConfig, layouts: Sequence[VisionLayout] | None) -> None:
        if model in ATTACHED:
            raise LightKVError("this model is already being compressed: end the other scope (with compress(...)) first")
        self.model = model
        self.config = config
        self.family = family_of(model.config) if layouts is None else FAMILIES.get(model.config.model_type)
        self.layouts = layouts
        self.decoder = model.get_decoder()
        self.report = Report()
        self.expected: Sequence[VisionLayout] | None = None  # layouts of the prompts of a running `generate`
        self.prefill: Prefill | None = None  # of the forward in progress
        self.step: dict[str, Any] = {}  # layouts and positions of that forward
        self.given: dict[int, dict[str, Any]] = {}  # number of stages before a layer → its arguments
        self.weights: dict[int, KeyWeights | None] = {}  # the same → the weights of its keys
        self.unread: set[int] = set()  # layers whose attention has not read its weights yet
        self.known: WeakKeyDictionary[Cache, Prefill] = WeakKeyDictionary()
        self.text_config = self.decoder.config
        self.signature = inspect.signature(model.forward)
        self._check_decoder()

    def _check_decoder(self) -> None:
        check_attention(self.decoder)
        self.config.check_depth(len(self.decoder.layers), first_stage_layer(self.model.config))
        rope = getattr(self.text_config, "rope_parameters", None) or {}
        self.mrope = "mrope_section" in rope
        if self.config.positions == "compact" and rope.get("rope_type") in ("dynamic", "longrope"):
            raise UnsupportedModelError(
                f'positions="compact" cannot be used with {rope["rope_type"]} RoPE, whose angles depend on the length'
            )

    def _check_attention(self, base: str) -> None:
        """Raises UnsupportedModelError if a flash kernel has no room for the dimensions that carry the sizes."""
        heads = self.text_config.num_attention_heads
        width = getattr(self.text_config, "head_dim", None) or self.text_config.hidden_size // heads
        crowded = "flash" in base and width + EXTRA_DIMS > FLASH_DIMS
        if METHODS[self.config.method].proportional and crowded and not use_triton(next(self.model.parameters())):
            raise UnsupportedModelError(
                f"method={self.config.method!r} needs heads of {width} + {EXTRA_DIMS} dimensions, {base} has at most "
                f'{FLASH_DIMS}: use model.set_attn_implementation("sdpa")'
            )

    def attach(self, undo: ExitStack) -> None:
        """Installs everything; `undo` removes it again in reverse order."""
        ATTACHED.add(self.model)
        undo.callback(ATTACHED.discard, self.model)
        base = self.text_config._attn_implementation or "eager"
        self._check_attention(base)
        name = hooked(base)
        undo.callback(setattr, self.text_config, "_attn_implementation", self.text_config._attn_implementation)
        self.text_config._attn_implementation = name
        layers = self.decoder.layers
        method = METHODS[self.config.method]
        scored = {stage.layer for n, stage in enumerate(self.config.stages) if method.scorer(self.config, n)}
        first = self.config.stages[0].layer + 1 if self.config.stages else len(layers)
        hooks = [
            self.model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            self.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            self.decoder.register_forward_hook(self._after_decoder),
        ]
        for index, layer in enumerate(layers):
            tap = self._score if index in scored else None
            weights = partial(self._weights, index) if index >= first and method.proportional else None
            if tap is not None or weights is not None:
                HOOKS[layer.self_attn] = AttentionHook(tap, weights)
                undo.callback(HOOKS.pop, layer.self_attn, None)
        for index in range(first, len(layers)):
            hook = partial(self._before_layer, index)
            hooks.append(layers[index].register_forward_pre_hook(hook, with_kwargs=True))
        for handle in hooks:
            undo.callback(handle.remove)
        if hasattr(self.model, "generate"):
            undo.callback(_restore, self.model, "generate", self.model.__dict__.get("generate"))
            self.model.generate = wraps(self.model.generate)(partial(self._generate, self.model.generate))

    # --- the caller's side: refuse unsupported calls, find the vision tokens ---

    def _generate(self, generate: Any, *args: Any, **kwargs: Any) -> Any:
        """`generate` after a check of its arguments; only here are images still assigned to their prompts."""
        inputs = dict(kwargs)
        if args:
            inputs["input_ids" if args[0].ndim == 2 else "inputs_embeds"] = args[0]
        elif kwargs.get("inputs") is not None:
            inputs["input_ids"] = kwargs["inputs"]
        if self.expected is not None:
            raise UnsupportedCallError("this scope is already generating: one call at a time, or one model per thread")
        refuse_generation(self.model, inputs)
        layouts = self._layouts(inputs)
        prompt = inputs.get("input_ids") if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        if prompt is not None and _any_vision(layouts):
            # Called only for its errors, so that they come before the images are encoded.
            rows_for_batch(layouts, inputs.get("attention_mask"), *prompt.shape[:2])
        self.expected = layouts
        try:
            return generate(*args, **kwargs)
        finally:
            self.expected = None

    def _layouts(self, inputs: Mapping[str, Any]) -> Sequence[VisionLayout]:
        if self.layouts is not None:
            return self.layouts
        input_ids = inputs.get("input_ids")
        if input_ids is None or input_ids.numel() == 0:
            raise UnsupportedCallError(
                "without input_ids the vision tokens cannot be found: pass layouts= (one VisionLayout per prompt)"
            )
        assert self.family is not None
        return self.family.layouts(self.model.config, input_ids, inputs)

    def _before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = self.signature.bind_partial(*args, **kwargs).arguments
        inputs = {**inputs, **inputs.pop("kwargs", {})}
        if inputs.get("labels") is not None:
            raise UnsupportedCallError("labels cannot be used: the sequence gets shorter inside the model")
        self.step, self.given, self.weights = {}, {}, {}
        self.unread.clear()
        if seen_tokens(inputs.get("past_key_values")) == 0:
            self.step["layouts"] = self.expected if self.expected is not None else self._layouts(inputs)

    # --- the decoder's side ---

    def _before_decoder(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        batch, length = states.shape[:2]
        cache = kwargs.get("past_key_values")
        past = seen_tokens(cache)
        positions = None
        if self.config.positions == "compact":
            positions = self._positions(kwargs.get("position_ids"), batch, length, past, states.device)
            self.step["positions"] = positions
        if past == 0:
            self.prefill = self._begin(batch, length, positions, states.device, kwargs)
        else:
            self.prefill = self.known.get(cache)
            refuse_reuse(cache, self.prefill is not None, length)

    def _begin(
        self, batch: int, length: int, positions: Tensor | None, device: torch.device, kwargs: Mapping[str, Any]
    ) -> Prefill | None:
        """The state of a new prefill; None without vision tokens, which leaves the prefill unchanged bit for bit."""
        layouts = [layout.to(device) for layout in self.step["layouts"]]
        if not _any_vision(layouts):
            return None
        use_cache = kwargs.get("use_cache")
        refuse_cache(kwargs.get("past_key_values"), self.text_config.use_cache if use_cache is None else use_cache)
        rows = rows_for_batch(layouts, kwargs.get("attention_mask"), batch, length)
        return Prefill(self.config, rows, length, positions)

    def _positions(self, given: Tensor | None, batch: int, length: int, past: int, device: torch.device) -> Tensor:
        """RoPE positions as the decoder uses them: [B, S], or [3, B, S] for M-RoPE."""
        if given is None:
            given = torch.arange(past, past + length, device=device)[None]
        if given.ndim == 3 and given.shape[0] == 4:  # Qwen-VL: text positions come first
            given = given[1:]
        if self.mrope and given.ndim == 2:
            given = given[None].expand(3, -1, -1)
        return given.expand(*given.shape[:-2], batch, length)

    def _score(self, q: Tensor, k: Tensor, scale: float) -> None:
        if self.prefill is not None and self.prefill.running:
            self.prefill.score(q, k, scale)

    def _weights(self, index: int) -> KeyWeights | None:
        self.unread.discard(index)
        return None if self.prefill is None else self.weights.get(self.prefill.group_of(index))

    def _before_layer(
        self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        prefill = self.prefill
        if prefill is None:
            return None
        number = prefill.group_of(index)
        hidden = args[0]
        if prefill.running and len(prefill.groups) == number:
            stage = self.config.stages[number - 1]
            hidden = prefill.compress(hidden, stage)
            if stage.layer == EMBEDDINGS:
                put_short_layer(kwargs["past_key_values"], args[0].shape[1] - hidden.shape[1])
        if number not in self.given:
            self.given[number] = self._inputs_of_group(number, index, hidden, kwargs)
        if self.weights[number] is not None:
            self.unread.add(index)
        return (hidden, *args[1:]), {**kwargs, **self.given[number]}

    def _inputs_of_group(self, number: int, index: int, hidden: Tensor, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Mask and positions of the layers after `number` stages; all of them share these in one forward."""
        prefill, cache = self.prefill, kwargs["past_key_values"]
        assert prefill is not None
        group = prefill.groups[number]
        past = held_tokens(cache, index)
        held = past + hidden.shape[1]
        mask = create_causal_mask(
            config=self.text_config,
            inputs_embeds=hidden,
            attention_mask=group.mask(held),
            past_key_values=cache_holding(past),
        )
        self.weights[number] = group.weights(held) if prefill.method.proportional else None
        angles = kwargs["position_embeddings"]
        if group.positions is not None:
            positions = (
                group.positions
                if prefill.running
                else self.step["positions"] - group.closed[:, None].to(self.step["positions"].device)
            )
            angles = self.decoder.rotary_emb(hidden, positions.to(hidden.device))
        elif prefill.running:
            angles = tuple(_rows_at(angle, group.origin) for angle in angles)
        # Attention reads position_ids only to detect packed sequences; it would take gaps between survivors for those.
        return {"attention_mask": mask, "position_embeddings": angles, "position_ids": None}

    def _after_decoder(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        prefill, cache = self.prefill, output.past_key_values
        if self.unread:
            raise LightKVError(
                f"layers {sorted(self.unread)} did not run their attention through transformers' AttentionInterface"
            )
        if prefill is not None and prefill.running:
            prefill.running = False
            self.known[cache] = prefill
            prefill.record(self.report, cache, len(self.decoder.layers))
        elif prefill is None and "layouts" in self.step:
            self.report.record_text(cache)


def _any_vision(layouts: Sequence[VisionLayout]) -> bool:
    return any(bool(layout.is_vision.any()) for layout in layouts)


def _rows_at(angle: Tensor, index: Tensor) -> Tensor:
    """angle [..., B or 1, S, d] at index [B, S'] of each row → [..., B, S', d]."""
    batch, length = angle.shape[-3:-1]
    first = torch.arange(batch, device=angle.device)[:, None] * length
    rows = index.to(angle.device) + first
    return angle.flatten(-3, -2).index_select(-2, rows.flatten()).unflatten(-2, rows.shape)


def _restore(target: object, name: str, value: object | None) -> None:
    """Sets an instance attribute back to `value`, or deletes it if there was none."""
    if value is None:
        target.__dict__.pop(name, None)
    else:
        setattr(target, name, value)
