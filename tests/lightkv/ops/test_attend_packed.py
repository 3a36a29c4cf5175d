"""attend_packed: the twin against `attend` sequence by sequence and in fp64, the kernels against the twin."""

from itertools import accumulate

import pytest
import torch

from lightkv.errors import ConfigError
from lightkv.ops.attend import attend_fused, attend_torch
from lightkv.ops.attend_packed import attend_packed, attend_packed_torch
from tests.lightkv.ops.test_attend import FP16, FP32, assert_near, dense

SIZES = [(9, 9), (0, 4), (4, 9), (0, 0), (1, 12), (20, 20)]  # (queries, keys) of each sequence


def starts(sizes):
    return torch.tensor([0, *accumulate(sizes)])


def case(sizes=SIZES, heads=(6, 2), dims=20, dtype=FP32, seed=0):
    """Arguments by name."""
    draw = torch.Generator().manual_seed(seed)
    lengths, reaches = zip(*sizes, strict=True)
    q = torch.randn(sum(lengths), heads[0], dims, generator=draw).to(dtype)
    k, v = (torch.randn(sum(reaches), heads[1], dims, generator=draw).to(dtype) for _ in range(2))
    return {
        "q": q, "k": k, "v": v, "bias": torch.randint(1, 300, (len(k),), generator=draw).float().log(),
        "starts_q": starts(lengths), "starts_k": starts(reaches), "scale": dims**-0.5,
        "most_q": max(lengths), "most_k": max(reaches),
    }  # fmt: skip


def apart(form, arguments):
    """form(q, k, v, bias) on every sequence that has queries, as a batch of one; packed again."""
    q, k, v, bias = (arguments[name] for name in ("q", "k", "v", "bias"))
    out = torch.empty_like(q)
    for r in range(len(arguments["starts_q"]) - 1):
        mine, theirs = (slice(*arguments[name][r : r + 2].tolist()) for name in ("starts_q", "starts_k"))
        if mine.start < mine.stop:
            states = (x.transpose(0, 1)[None] for x in (q[mine], k[theirs], v[theirs]))
            out[mine] = form(*states, None if bias is None else bias[None, theirs])[0]
    return out


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "plain"])
def test_twin_is_attention_under_a_dense_mask(biased):
    arguments = case()
    arguments["bias"] = arguments["bias"] if biased else None
    out = attend_packed_torch(**arguments)
    assert (out.shape, out.dtype) == ((34, 6, 20), FP32)
    assert_near(out, apart(lambda q, k, v, bias: dense(q, k, v, bias, None, 20**-0.5), arguments), 1e-5)


@pytest.mark.parametrize("choice", ["torch", "auto"])
@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_cpus_run_attend_on_each_sequence(choice, dtype, monkeypatch):
    monkeypatch.setenv("LIGHTKV_OPS", choice)
    arguments = case(dtype=dtype)

    def alone(q, k, v, bias):
        if choice == "auto" and dtype == FP32:
            return attend_fused(q, k, v, bias, 20**-0.5)
        return attend_torch(q, k, v, bias, None, 20**-0.5)

    assert torch.equal(attend_packed(**arguments), apart(alone, arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=torch.zeros(6, 4, 8, dtype=torch.float64)), "share a dtype"),
        (dict(v=torch.zeros(7, 2, 16)), r"expected q \[N, Hq, d\]"),
        (dict(q=torch.zeros(6, 3, 8)), "multiple of key heads"),
        (dict(q=torch.zeros(6, 4, 300)), "1 to 256"),
        (dict(bias=torch.zeros(7).half()), r"bias must be float32 \[7\], got torch.float16"),
        (dict(bias=torch.zeros(6)), r"got torch.float32 \[6\]"),
        (dict(starts_q=torch.tensor([0, 3, 6]).int()), "starts_q must be int64"),
        (dict(starts_k=torch.tensor([[0, 3, 7]])), "starts_k must be int64 with one dimension"),
        (dict(starts_k=torch.tensor([0, 7])), "starts must be sequences . 1 on both sides, got 3 and 2"),
        (dict(starts_q=torch.tensor([], dtype=torch.int64)), "sequences . 1"),
        (dict(most_q=2), "2 sequences of at most most_q = 2 queries cannot have 6"),
        (dict(starts_q=torch.tensor([0, 4, 6])), "queries are the last of their sequence's keys, got 4 of 3"),
        (dict(starts_q=torch.tensor([0, 2, 6])), "must be at least 4 and 4, got 3 and 4"),
        (dict(most_k=3), "must be at least 3 and 4, got 3 and 3"),
        (dict(starts_q=torch.tensor([0, 3, 5])), "from 0 to 6 for queries"),
        (dict(starts_k=torch.tensor([0, 3, 8])), "within 7 for keys, got 0 to 6 and 0 to 8"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    fits = {
        "q": torch.zeros(6, 4, 8), "k": torch.zeros(7, 2, 8), "v": torch.zeros(7, 2, 8), "bias": None,
        "starts_q": torch.tensor([0, 3, 6]), "starts_k": torch.tensor([0, 3, 7]),
        "scale": 1.0, "most_q": 3, "most_k": 4,
    }  # fmt: skip
    attend_packed(**fits)
    with pytest.raises(ConfigError, match=message):
        attend_packed(**{**fits, **change})
