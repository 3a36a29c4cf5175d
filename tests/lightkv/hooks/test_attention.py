import pytest
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_flash_attention_utils import _is_packed_sequence
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from lightkv import LightKVConfig, Stage, compress
from lightkv.hooks.attention import EXTRA_DIMS, HOOKS, AttentionHook, KeyWeights, hooked
from tests.lightkv.tiny import random, tiny_batch, tiny_model, tiny_sample

CONFIG = LightKVConfig((Stage(0, 2, 0.5), Stage(2, 1, 0.5)))


def rows_apart(module, q, k, v, attention_mask, scaling, position_ids=None, **_):
    """Attention with the interface of a flash kernel: the mask is None or [B, keys] and marks only padding.

    Where such a kernel gets position_ids it looks for packed sequences in them: they must fit the queries.
    """
    assert position_ids is None or position_ids.shape[-1] == q.shape[2]
    assert not _is_packed_sequence(position_ids, len(q))
    group, out = q.shape[1] // k.shape[1], torch.zeros_like(q)
    for row in range(len(q)):
        keys = k.shape[2] if attention_mask is None else int(attention_mask[row].sum())
        queries = min(q.shape[2], keys)
        causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        out[row, :, -queries:] = F.scaled_dot_product_attention(
            q[row, :, -queries:],
            k[row, :, -keys:].repeat_interleave(group, 0),
            v[row, :, -keys:].repeat_interleave(group, 0),
            attn_mask=causal,
            scale=scaling,
        )
    return out.transpose(1, 2), None


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_kernels_that_take_the_padding_only_do_the_same(family, rows, monkeypatch):
    """FlashAttention's contract: no dense mask, causal from the lower right, rows cut to their own lengths."""
    AttentionInterface.register("flash_like", rows_apart)
    AttentionMaskInterface.register("flash_like", flash_attention_mask)
    model = tiny_model(family)
    samples = [tiny_sample(family, 0, 1), tiny_sample(family, 2), tiny_sample(family, question=[4])]
    batch = tiny_batch(family, samples[:rows])
    options = dict(max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True)
    logits = []
    for name in ("sdpa", "flash_like"):
        monkeypatch.setattr(model.config.text_config, "_attn_implementation_internal", name)
        with compress(model, CONFIG):
            logits.append(torch.cat(model.generate(**batch, **options).logits))
    torch.testing.assert_close(logits[0], logits[1], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("base", ["sdpa", "eager", "flash_attention_2", "flash_attention_3"])
def test_names_are_registered_in_both_tables(base):
    name = hooked(base)
    assert name in ALL_ATTENTION_FUNCTIONS
    assert ALL_MASK_ATTENTION_FUNCTIONS[name] is ALL_MASK_ATTENTION_FUNCTIONS[base]
    assert is_flash_attention_requested(requested_attention_implementation=name) == base.startswith("flash")
    assert hooked(base) == name


@pytest.fixture
def attention():
    """An attention module with 4 query heads and 2 key heads; its hooks are removed after the test."""
    module = tiny_model("llava").get_decoder().layers[0].self_attn
    yield module
    HOOKS.pop(module, None)


def by_hand(q, k, v, bias, pads, scale):
    """softmax(q · k · scale + bias) v in fp32, causal from the lower right, padding keys on the left masked."""
    group, (queries, keys) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    k, v = (states.float().repeat_interleave(group, 1) for states in (k, v))
    column = torch.arange(keys)
    seen = (column <= torch.arange(keys - queries, keys)[:, None]) & (column >= torch.tensor(pads)[:, None, None])
    scores = (q.float() @ k.transpose(2, 3) * scale + bias[:, None, None]).masked_fill(~seen[:, None], -1e30)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("pads", [(0, 0), (3, 0)], ids=["whole", "padded"])
@pytest.mark.parametrize("queries", [9, 1], ids=["prefill", "decode"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)], ids=str
)
@pytest.mark.parametrize("base", ["sdpa", "eager", "flash_like"])
def test_a_bias_per_key_is_added_to_the_scores(attention, base, dtype, tolerance, queries, pads):
    AttentionInterface.register("flash_like", rows_apart)
    AttentionMaskInterface.register("flash_like", flash_attention_mask)
    q, k, v = (random(2, heads, n, 8, seed=n + heads).to(dtype) for heads, n in ((4, queries), (2, 9), (2, 9)))
    bias = torch.tensor([1.0, 1, 1, 300, 1, 7, 1, 2, 1]).log().expand(2, -1)
    seen = torch.arange(9) >= torch.tensor(pads)[:, None]
    if base == "flash_like":
        mask = seen if any(pads) else None
    else:
        mask = seen[:, None, None] & torch.ones(queries, 9, dtype=torch.bool).tril(9 - queries)
        if base == "eager":
            mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
        elif not any(pads):
            mask = None
    HOOKS[attention] = AttentionHook(weights=lambda: KeyWeights(bias, None))
    out, _ = ALL_ATTENTION_FUNCTIONS[hooked(base)](attention, q, k, v, mask, scaling=0.3, is_causal=queries > 1)
    assert (out.dtype, out.shape) == (dtype, (2, queries, 4, 8))
    expected, real = by_hand(q, k, v, bias, pads, 0.3), seen[:, -queries:]  # outputs at padding do not matter
    torch.testing.assert_close(out.float()[real], expected[real], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("scale", [8**-0.5, 0.02])
def test_half_precision_scores_lose_nothing_of_the_bias(attention, scale):
    """Two keys of equal scores and opposite bias get attention in the exact ratio of their sizes."""
    q, k, v = torch.zeros(1, 4, 2, 8).bfloat16(), torch.zeros(1, 2, 2, 8).bfloat16(), torch.zeros(1, 2, 2, 8).bfloat16()
    v[:, :, 1] = 1.0
    HOOKS[attention] = AttentionHook(weights=lambda: KeyWeights(torch.tensor([[1000.0, 1003.0]]).log(), None))
    out, _ = ALL_ATTENTION_FUNCTIONS[hooked("sdpa")](attention, q, k, v, None, scaling=scale)
    assert out[0, 0].eq(0.0).all()
    torch.testing.assert_close(out[0, 1].float(), torch.full((4, 8), 1003 / 2003), atol=2e-3, rtol=0)
    kernel_sees = {}

    def look(module, q, k, v, attention_mask, **options):
        kernel_sees.update(scores=(q[:, :1].float() @ k[:, :1].float().transpose(2, 3))[0, 0, 0], dims=q.shape[-1])
        return rows_apart(module, q, k, v, attention_mask, **options)

    AttentionInterface.register("looking", look)
    AttentionMaskInterface.register("looking", flash_attention_mask)
    ALL_ATTENTION_FUNCTIONS[hooked("looking")](attention, q, k, v, None, scaling=scale)
    torch.testing.assert_close(kernel_sees["scores"] * scale, torch.tensor([1000.0, 1003.0]).log(), atol=1e-4, rtol=0)
    assert kernel_sees["dims"] == 8 + EXTRA_DIMS


@pytest.mark.parametrize("queries", [5, 1])
def test_equal_tokens_merged_into_one_of_their_size_attend_as_before(attention, queries):
    q, k, v = (random(1, heads, n, 8, seed=heads) for heads, n in ((4, queries), (2, 9), (2, 9)))
    same = torch.tensor([0, 1, 1, 1, 2, 3, 3, 4, 5])  # 9 copies of 6 tokens; the queries come after all of them
    forward = ALL_ATTENTION_FUNCTIONS[hooked("sdpa")]
    mask = torch.ones(1, 1, queries, 9, dtype=torch.bool)
    before, _ = forward(attention, q, k[:, :, same], v[:, :, same], mask)
    HOOKS[attention] = AttentionHook(weights=lambda: KeyWeights(torch.bincount(same).float().log()[None], None))
    after, _ = forward(attention, q, k[:, :, :6], v[:, :, :6], mask[..., :6])
    torch.testing.assert_close(after, before, atol=1e-6, rtol=1e-5)
