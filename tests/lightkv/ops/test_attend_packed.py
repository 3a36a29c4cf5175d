"""attend_packed: the twin against fp64 and `attend` sequence by sequence, the kernels against the twin."""

from functools import wraps
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightkv.errors import ConfigError
from lightkv.ops import attend_kernel
from lightkv.ops import attend_packed as operation
from lightkv.ops.attend import attend_fused, attend_torch
from lightkv.ops.attend_kernel import attend_triton
from lightkv.ops.ragged import Keys, Sequences
from tests.lightkv.ops.test_attend import BF16, FP16, FP32, TOLERANCE, assert_near, dense, poisoned


def flat(form):
    """`form` with the fields of keys and sequences as parameters, so that a case can change one of them."""

    @wraps(form)
    def call(q, k, v, bias, starts_q, starts_k, scale, longest_q, longest_k):
        return form(q, Keys(k, v, bias), Sequences(starts_q, longest_q), Sequences(starts_k, longest_k), scale)

    return call


attend_packed, attend_packed_torch = flat(operation.attend_packed), flat(operation.attend_packed_torch)
attend_packed_triton = flat(attend_kernel.attend_packed_triton)
FORMS = [attend_packed_torch, attend_packed_triton]
SIZES = [(4, 9), (0, 4), (0, 0), (1, 12), (20, 20)]  # (queries, keys) of each sequence


def starts(sizes):
    return torch.tensor([0, *accumulate(sizes)])


def case(sizes=SIZES, heads=(4, 2), dims=20, dtype=FP32, seed=0):
    """Returns the arguments of attend_packed by name."""
    draw = torch.Generator().manual_seed(seed)
    lengths, reaches = zip(*sizes, strict=True)
    q = torch.randn(sum(lengths), heads[0], dims, generator=draw).to(dtype)
    k, v = (torch.randn(sum(reaches), heads[1], dims, generator=draw).to(dtype) for _ in range(2))
    return {
        "q": q, "k": k, "v": v, "bias": torch.randint(1, 300, (len(k),), generator=draw).float().log(),
        "starts_q": starts(lengths), "starts_k": starts(reaches), "scale": dims**-0.5,
        "longest_q": max(lengths), "longest_k": max(reaches),
    }  # fmt: skip


def apart(form, arguments):
    """Runs form(q, k, v, bias) on each sequence with queries, as a batch of one, and packs the results."""
    q, k, v, bias = (arguments[name] for name in ("q", "k", "v", "bias"))
    out = torch.empty_like(q)
    for r in range(len(arguments["starts_q"]) - 1):
        mine, theirs = (slice(*arguments[name][r : r + 2].tolist()) for name in ("starts_q", "starts_k"))
        if mine.start < mine.stop:
            states = (x.transpose(0, 1)[None] for x in (q[mine], k[theirs], v[theirs]))
            out[mine] = form(*states, None if bias is None else bias[None, theirs])[0]
    return out


def poison(patch):
    """Fills new memory with NaN; returns the list of all tensors that are allocated from then on."""
    empty, made = Tensor.new_empty, []

    def new_empty(like, *size, **how):
        made.append(poisoned(empty(like, *size, **how)))
        return made[-1]

    patch.setattr(Tensor, "new_empty", new_empty)
    return made


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "plain"])
def test_twin_is_attention_under_a_dense_mask(biased):
    arguments = case()
    arguments["bias"] = arguments["bias"] if biased else None
    out = attend_packed_torch(**arguments)
    assert (out.shape, out.dtype) == ((25, 4, 20), FP32)
    assert_near(out, apart(lambda q, k, v, bias: dense(q, k, v, bias, None, 20**-0.5), arguments), 1e-5)


@pytest.mark.parametrize(("choice", "form"), [("torch", attend_packed_torch), ("triton", attend_packed_triton)])
def test_form_is_chosen_by_dispatch(choice, form, monkeypatch):
    monkeypatch.setenv("LIGHTKV_OPS", choice)
    arguments = case()
    assert torch.equal(attend_packed(**arguments), form(**arguments))


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
    ("sizes", "heads", "dims", "dtype"),
    [
        ([(17, 17), (40, 75), (0, 3)], (2, 2), 32, FP32),
        ([(17, 17), (40, 75), (0, 3)], (2, 2), 32, FP16),
        ([(130, 140), (0, 0), (18, 18)], (2, 1), 80, BF16),  # two tiles of queries
        ([(20, 33), (65, 130)], (7, 1), 96, FP16),
        ([(1, 600), (1, 1), (0, 5), (1, 257)], (4, 2), 128, BF16),  # three chunks, one, two
        ([(1, 600), (1, 1), (0, 5), (1, 257)], (2, 1), 32, FP32),
        ([(5, 65), (16, 16)], (7, 1), 32, FP16),
        (SIZES, (6, 2), 20, FP32),
        (SIZES, (6, 2), 136, BF16),
        ([(1, 20), (18, 20)], (1, 1), 256, FP32),
    ],
)
def test_kernels_are_the_twin(sizes, heads, dims, dtype):
    arguments = case(sizes, heads, dims, dtype)
    out = attend_packed_triton(**arguments)
    assert (out.shape, out.dtype) == (arguments["q"].shape, dtype)
    assert_near(out, attend_packed_torch(**arguments), TOLERANCE[dtype])


@settings(max_examples=12)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 90)).map(lambda pair: (pair[0], sum(pair))), max_size=5)
    .filter(lambda sizes: any(length for length, _ in sizes)),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    deaf=st.floats(0, 1),
    spare=st.integers(0, 30),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_kernels_are_the_twin_on_ragged_sequences(sizes, heads, deaf, spare, seed):
    arguments = case(sizes, heads, 16, seed=seed)
    bias = arguments["bias"]
    bias[torch.rand(bias.shape, generator=torch.Generator().manual_seed(seed)) < deaf] = -torch.inf
    expected = attend_packed_torch(**arguments)
    arguments["longest_q"], arguments["longest_k"] = arguments["longest_q"] + spare, arguments["longest_k"] + spare
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attend_kernel, "CHUNK_KEYS", 16)  # several chunks for few keys
        patch.setattr(attend_kernel, "MAX_CHUNKS", 4)
        poison(patch)
        assert_near(attend_packed_triton(**arguments), expected, 1e-5)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_kernels_do_to_each_sequence_what_attend_does(dtype):
    """Bit for bit where both have the same tiles: one query, or a prefill."""
    arguments = case([(1, 300), (20, 20), (0, 2), (1, 1), (17, 64)], dtype=dtype)
    alone = apart(lambda q, k, v, bias: attend_triton(q, k, v, bias, None, 20**-0.5), arguments)
    assert torch.equal(attend_packed_triton(**arguments), alone)


def only(arguments, r):
    """The arguments of sequence r alone."""
    mine, theirs = (slice(*arguments[name][r : r + 2].tolist()) for name in ("starts_q", "starts_k"))
    length, reach = mine.stop - mine.start, theirs.stop - theirs.start
    return arguments | {
        "q": arguments["q"][mine], "k": arguments["k"][theirs], "v": arguments["v"][theirs],
        "bias": arguments["bias"][theirs], "starts_q": starts([length]), "starts_k": starts([reach]),
        "longest_q": length, "longest_k": reach,
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # from the interpreter, for the other sequences
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("r", [0, 1, 2, 3])
def test_what_else_is_in_the_launch_does_not_matter(form, r):
    arguments = case([(1, 70), (35, 40), (5, 300), (17, 17)], dtype=FP16)
    alone = form(**only(arguments, r))
    mine, theirs = (slice(*arguments[name][r : r + 2].tolist()) for name in ("starts_q", "starts_k"))
    for name, own in (("q", mine), ("k", theirs), ("v", theirs), ("bias", theirs)):
        others = torch.ones(len(arguments[name]), dtype=torch.bool)
        others[own] = False
        arguments[name][others] = torch.nan
    assert torch.equal(form(**arguments)[mine], alone)


def test_kernels_repeat_themselves_and_take_loose_bounds_bit_for_bit():
    arguments = case(heads=(2, 1), dtype=BF16)
    out = attend_packed_triton(**arguments)
    assert torch.equal(out, attend_packed_triton(**arguments))
    assert torch.equal(out, attend_packed_triton(**arguments | {"longest_q": 40, "longest_k": 300}))


@pytest.mark.parametrize("sizes", [SIZES, [(1, 30), (2, 9)], [(20, 20), (33, 40)]], ids=["both", "decode", "prefill"])
def test_kernels_take_any_strides_and_write_all_they_return(sizes, monkeypatch):
    arguments = case(sizes, dims=16)
    expected = attend_packed_triton(**arguments)
    poison(monkeypatch)
    k, v, bias, keys = arguments["k"], arguments["v"], arguments["bias"], len(arguments["k"])
    room = torch.full((2, 2 * keys + 20, 24), torch.nan)  # every other token of a wider cache, heads first
    room[:, 10 : 10 + 2 * keys : 2, 4:20] = k.transpose(0, 1)
    apart_v = torch.full((16, 2, keys + 10), torch.nan)  # last dimension not contiguous
    apart_v[:, :, 5:-5] = v.permute(2, 1, 0)
    biases = torch.full((keys + 10, 3), torch.nan)
    biases[5:-5, 1] = bias
    arguments |= {
        "k": room[:, ::2, 4:20].transpose(0, 1), "v": apart_v.permute(2, 1, 0), "bias": biases[:, 1],
        "starts_k": (arguments["starts_k"] + 5).repeat_interleave(2)[::2],
        "q": arguments["q"].transpose(0, 1).contiguous().transpose(0, 1),
    }  # fmt: skip
    assert torch.equal(attend_packed_triton(**arguments), expected)
    assert_near(attend_packed_torch(**arguments), expected, 1e-5)


@pytest.mark.parametrize("form", [*FORMS, attend_packed])
@pytest.mark.parametrize("bias", [-1e4, -torch.inf])
def test_biases_of_any_size_give_finite_results(form, bias, monkeypatch):
    monkeypatch.delenv("LIGHTKV_OPS", raising=False)
    arguments = case(dims=16)
    arguments["bias"] = torch.full_like(arguments["bias"], bias)
    plain = torch.zeros_like(arguments["q"]) if bias == -torch.inf else form(**arguments | {"bias": None})
    assert_near(form(**arguments), plain, 1e-2)  # fp32 has steps of 1e-3 at 1e4


@pytest.mark.parametrize("length", [18, 1], ids=["prefill", "decode"])
def test_kernels_read_beyond_two_to_the_31_elements(length, tmp_path):
    """In a sparse file, of which only touched pages use disk space."""
    arguments = case([(length, 18), (length, 18)], (1, 1), 16, FP16)
    expected, apart, file = attend_packed_triton(**arguments), 1 << 27, tmp_path / "sparse"
    memory = torch.from_file(str(file), shared=True, size=36 * apart, dtype=FP16)
    file.unlink()
    far = memory.as_strided((2, 36, 1, 16), (16, apart, 1, 1))
    far.copy_(torch.stack([arguments["k"], arguments["v"]]))
    assert torch.equal(attend_packed_triton(**arguments | {"k": far[0], "v": far[1]}), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [[], [(0, 0)], [(0, 5), (0, 0)]])
def test_nothing_in_nothing_out(form, sizes):
    arguments = case([*sizes, (0, 0)]) | {"starts_q": starts([0] * len(sizes))}
    arguments["starts_k"] = arguments["starts_k"][: len(sizes) + 1]
    assert form(**arguments).shape == (0, 4, 20)


@pytest.mark.parametrize("form", [*FORMS, attend_packed])
def test_result_carries_no_gradient(form):
    arguments = case()
    for name in ("q", "k", "v"):
        arguments[name].requires_grad_()
    assert not form(**arguments).requires_grad


def test_each_launch_leaves_the_sequences_of_the_other_alone(monkeypatch):
    arguments = case([(20, 20), (3, 9)], (1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(attend_kernel._Work, "decode", lambda *_: None)
        poison(patch)
        out = attend_packed_triton(**arguments)
        assert out.isnan().flatten(1).all(1).tolist() == [False] * 20 + [True] * 3
    monkeypatch.setattr(attend_kernel._Work, "prefill", lambda *_: None)
    made = poison(monkeypatch)
    out = attend_packed_triton(**arguments)
    assert out.isnan().flatten(1).all(1).tolist() == [True] * 20 + [False] * 3
    _, sums, values, *_ = made  # by slots; the first slot belongs to the prefill sequence
    assert sums[..., 0].isnan().all()
    assert values[:, :, 0].isnan().all()


@pytest.mark.parametrize(
    ("sizes", "launches"),
    [
        ([(1, 9), (3, 3)], ["decode"]),
        ([(20, 20), (20, 30)], ["prefill"]),
        ([(40, 40)], ["prefill"]),
        ([(20, 20), (1, 9)], ["prefill", "decode"]),
    ],
)
def test_a_launch_that_has_nothing_to_do_is_left_out(sizes, launches, monkeypatch):
    called = []
    for name in ("prefill", "decode"):
        monkeypatch.setattr(attend_kernel._Work, name, lambda *_, name=name: called.append(name))
    attend_packed_triton(**case(sizes))
    assert called == launches


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=torch.zeros(6, 4, 8, dtype=torch.float64)), "share a dtype"),
        (dict(v=torch.zeros(7, 2, 16)), r"expected q \[N, Hq, d\]"),
        (dict(q=torch.zeros(6, 3, 8)), "multiple of key heads"),
        (dict(q=torch.zeros(6, 4, 300)), "1 to 256"),
        (dict(bias=torch.zeros(7).half()), r"bias must be float32 \[7\], got torch.float16"),
        (dict(bias=torch.zeros(6)), r"got torch.float32 \[6\]"),
        (dict(starts_q=torch.tensor([0, 3, 6]).int()), "q_sequences.starts must be int64"),
        (dict(starts_k=torch.tensor([[0, 3, 7]])), "k_sequences.starts must be int64 with one dimension"),
        (dict(starts_k=torch.tensor([0, 7])), "starts must be sequences . 1 on both sides, got 3 and 2"),
        (dict(starts_q=torch.tensor([], dtype=torch.int64)), "sequences . 1"),
        (dict(longest_q=2), r"2 sequences of at most 2 queries \(longest\) cannot have 6"),
        (dict(starts_q=torch.tensor([0, 4, 6])), "expected at most as many queries as keys in a sequence, got 4 of 3"),
        (dict(starts_q=torch.tensor([0, 2, 6])), "must be at least 4 and 4, got 3 and 4"),
        (dict(longest_k=3), "must be at least 3 and 4, got 3 and 3"),
        (dict(starts_q=torch.tensor([0, 3, 5])), "from 0 to 6 for queries"),
        (dict(starts_k=torch.tensor([0, 3, 8])), "within 7 for keys, got 0 to 6 and 0 to 8"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    fits = {
        "q": torch.zeros(6, 4, 8), "k": torch.zeros(7, 2, 8), "v": torch.zeros(7, 2, 8), "bias": None,
        "starts_q": torch.tensor([0, 3, 6]), "starts_k": torch.tensor([0, 3, 7]),
        "scale": 1.0, "longest_q": 3, "longest_k": 4,
    }  # fmt: skip
    attend_packed(**fits)
    with pytest.raises(ConfigError, match=message):
        attend_packed(**{**fits, **change})
