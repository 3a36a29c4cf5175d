"""An attention implementation that lets a stage see queries and keys, on top of whichever kernel the model uses.

transformers picks attention and mask functions by name. For a base name such as "sdpa" we register
"lightkv_sdpa": the same mask function, and an attention function that shows (q, k) to a tap and then calls the base.
Registration is process-wide and changes nothing until a model selects the name.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lightkv.errors import UnsupportedModelError

Tap = Callable[[Tensor, Tensor, float], None]  # q [B, Hq, S, d], k [B, Hkv, S, d], scale

TAPS: WeakKeyDictionary[nn.Module, Tap] = WeakKeyDictionary()


def tapped(base: str) -> str:
    """The name under which attention `base` runs with taps, registered on first use.

    Raises UnsupportedModelError for a base without a mask function: padding would be dropped silently.
    """
    if base not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise UnsupportedModelError(
            f"attention implementation {base!r} has no mask function in AttentionMaskInterface; "
            "use sdpa, eager or flash_attention_2, or register one"
        )
    name = f"lightkv_{base}"
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, partial(_attend, base))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def _attend(
    base: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    tap = TAPS.get(module)
    if tap is not None:
        scale = kwargs.get("scaling")
        tap(query, key, query.shape[-1] ** -0.5 if scale is None else scale)
    # Eager attention, and any override of a kernel, lives in the module that defines the attention class.
    home = sys.modules[type(module).__module__]
    functions = getattr(home, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    forward = functions.get_interface(base, getattr(home, "eager_attention_forward", None))
    return forward(module, query, key, value, attention_mask, **kwargs)
