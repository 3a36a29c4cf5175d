"""Generation with all kernels gives the same result as generation with all twins."""

import pytest
import torch

from lightkv import ConfigError, LightKVConfig, Stage, compress
from lightkv.ops.dispatch import use_triton
from tests.lightkv.tiny import tiny_batch, tiny_model, tiny_sample

CONFIGS = {
    "lightkv": LightKVConfig((Stage(-1, drop=0.5), Stage(0, drop=0.4)), method="lightkv"),
    "published": LightKVConfig((Stage(0, 2, 0.5), Stage(2, 1, 0.5))),
    "tome": LightKVConfig((Stage(-1, drop=0.7),), method="tome"),
}


def generated(config):
    """Two prompts of different length in one batch → logits of three new tokens, survivors of every stage."""
    model = tiny_model("qwen2_5_vl")
    batch = tiny_batch("qwen2_5_vl", [tiny_sample("qwen2_5_vl", video=0), tiny_sample("qwen2_5_vl", 1)])
    options = dict(do_sample=False, max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
    with compress(model, config) as report:
        out = model.generate(**batch, **options)
    return torch.stack(out.logits), [stage for row in report.survivors for stage in row]


@pytest.mark.parametrize("method", CONFIGS)
def test_kernels_generate_what_their_twins_do(monkeypatch, method):
    monkeypatch.setenv("LIGHTKV_OPS", "torch")
    logits, survivors = generated(CONFIGS[method])
    monkeypatch.setenv("LIGHTKV_OPS", "triton")
    kernels = []
    for name in ("nearest_kernel.nearest_triton", "merge_kernel.merge_triton", "compact_kernel.compact_triton",
                 "votes_kernel.softmax_votes_triton", "attend_kernel.attend_triton"):  # fmt: skip
        watch(monkeypatch, f"lightkv.ops.{name}", kernels)
    by_kernels, their_survivors = generated(CONFIGS[method])
    torch.testing.assert_close(by_kernels, logits, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(survivors, their_survivors, strict=True):
        assert torch.equal(ours.kept, theirs.kept)
        assert torch.equal(ours.target, theirs.target)
    # "published" needs one matching per stage here, so `compact` does all of its merges.
    others = {"lightkv": {"merge_triton", "softmax_votes_triton", "attend_triton"},
              "published": {"softmax_votes_triton"}, "tome": {"merge_triton", "attend_triton"}}  # fmt: skip
    assert set(kernels) == {"nearest_triton", "compact_triton"} | others[method]


def watch(monkeypatch, path, calls):
    """Appends the name of the function at `path` to `calls` at every call."""
    module, name = path.rsplit(".", 1)
    function = getattr(pytest.importorskip(module), name)
    monkeypatch.setattr(path, lambda *args: calls.append(name) or function(*args))


def test_the_environment_chooses(monkeypatch):
    tensor = torch.zeros(1)
    for choice, expected in (("auto", False), ("torch", False), ("triton", True)):
        monkeypatch.setenv("LIGHTKV_OPS", choice)
        assert use_triton(tensor) is expected
    monkeypatch.setenv("LIGHTKV_OPS", "cuda")
    with pytest.raises(ConfigError, match=r"LIGHTKV_OPS must be one of .*got 'cuda'"):
        use_triton(tensor)
