import pytest
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_flash_attention_utils import _is_packed_sequence
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from lightkv import LightKVConfig, Stage, compress
from lightkv.attention import tapped
from tests.lightkv.tiny import tiny_batch, tiny_model, tiny_sample

CONFIG = LightKVConfig((Stage(0, 2, 0.5), Stage(2, 1, 0.5)))


def rows_apart(module, q, k, v, attention_mask, scaling, position_ids=None, **_):
    """Attention with the interface of a flash kernel: the mask is None or [B, keys] and says only what is padding.

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
    name = tapped(base)
    assert name in ALL_ATTENTION_FUNCTIONS
    assert ALL_MASK_ATTENTION_FUNCTIONS[name] is ALL_MASK_ATTENTION_FUNCTIONS[base]
    assert is_flash_attention_requested(requested_attention_implementation=name) == base.startswith("flash")
    assert tapped(base) == name
