"""Quantised keys and values: round-trip error, the twin against dense attention, the kernel against the twin."""

from functools import wraps
from itertools import accumulate, pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightkv.errors import ConfigError
from lightkv.ops import quantised as operation
from lightkv.ops import quantised_kernel
from lightkv.ops.codes import Quantised, concatenated, dequantise, quantise
from lightkv.ops.quantised_kernel import quantised_tiles
from lightkv.ops.ragged import Keys, Sequences
from tests.lightkv.ops.offline import compile_kernel


def flat(form):
    """`form` with the fields of sequences and tail as parameters, so that a case can change one of them."""

    @wraps(form)
    def call(q, packed, starts, bias, tail_k, tail_v, tail_bias, scale, longest=None):
        sequences = Sequences(starts, len(packed) if longest is None else longest)
        return form(q, packed, sequences, bias, Keys(tail_k, tail_v, tail_bias), scale)

    return call


attend_quantised, attend_quantised_torch = flat(operation.attend_quantised), flat(operation.attend_quantised_torch)
attend_quantised_triton = flat(quantised_kernel.attend_quantised_triton)

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
TOLERANCE = {FP32: 1e-5, FP16: 2e-3, BF16: 2e-2}  # Triton's interpreter truncates to bf16, GPUs round
FORMS = [attend_quantised_torch, attend_quantised_triton]


def states(heads, tokens, dims, dtype=FP32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, heads, tokens, dims, generator=draw).to(dtype).unbind()


def case(sizes=(32, 0, 48), heads=(4, 2), dims=16, tail=5, bits=8, dtype=FP32, group=16, value_group=None, seed=0):
    """Returns the arguments of attend_quantised; every third key of the tail is masked out."""
    draw = torch.Generator().manual_seed(seed)
    (query_heads, key_heads), batch, tokens = heads, len(sizes), sum(sizes)
    tail_k, tail_v = states(batch * key_heads, tail, dims, dtype, seed + 1)
    return {
        "q": torch.randn(batch, query_heads, dims, generator=draw).to(dtype),
        "packed": quantise(*states(key_heads, tokens, dims, dtype, seed), bits, group, value_group),
        "starts": torch.tensor([0, *accumulate(sizes)]),
        "bias": torch.randint(1, 300, (tokens,), generator=draw).float().log(),
        "tail_k": tail_k.unflatten(0, (batch, key_heads)),
        "tail_v": tail_v.unflatten(0, (batch, key_heads)),
        "tail_bias": torch.randn(batch, tail, generator=draw).masked_fill(torch.arange(tail) % 3 == 1, -1e30),
        "scale": dims**-0.5,
    }


def dense(q, packed, starts, bias, tail_k, tail_v, tail_bias, scale):
    """PyTorch's attention in fp64, one sequence at a time, over the keys that are not masked out."""
    k, v = dequantise(packed, torch.float64)
    bias = torch.zeros(len(packed)) if bias is None else bias
    tail_bias = torch.zeros(len(q), tail_k.shape[2]) if tail_bias is None else tail_bias
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b, (begin, end) in enumerate(pairwise(starts.tolist())):
        mask = torch.cat([bias[begin:end], tail_bias[b]])
        there = mask > -1e30
        keys = torch.cat([k[:, begin:end], tail_k[b].double()], 1)[:, there]
        values = torch.cat([v[:, begin:end], tail_v[b].double()], 1)[:, there]
        keys, values = (x.repeat_interleave(q.shape[1] // len(x), 0) for x in (keys, values))
        if there.any():
            extra = mask[there].double()[None]
            out[b] = F.scaled_dot_product_attention(q[b, :, None].double(), keys, values, extra, scale=scale)[:, 0]
    return out


def poisoned(memory: Tensor) -> Tensor:
    return memory.fill_(torch.nan) if memory.is_floating_point() else memory


def assert_near(out: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(out.double(), expected.double(), atol=tolerance, rtol=tolerance)


def steps(q: Quantised) -> tuple[Tensor, Tensor]:
    """Returns the scale of every element of k and v."""
    scales = q.k_scale.repeat_interleave(q.group, 1), q.v_scale.repeat_interleave(q.value_group, 2)
    return scales[0].double(), scales[1].double()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("size", "offset"), [(1.0, 0.0), (2500.0, 0.0), (1.0, 300.0), (1e-3, 0.0), (1e-6, 0.0)])
def test_no_element_is_further_off_than_half_a_step(size, offset, bits, dtype):
    given = [(x.float() * size + offset).to(dtype) for x in states(2, 96, 24)]
    q = quantise(*given, bits)
    assert q.k_scale.dtype == q.v_zero.dtype == dtype
    for x, back, step in zip(given, dequantise(q, torch.float64), steps(q), strict=True):
        error = (x.double() - back).abs()
        assert (error <= step / 2 * (1 + 1e-5) + x.double().abs().max() * 1e-6).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bits", [4, 8])
def test_steps_are_no_larger_than_the_dtype_makes_them(bits, dtype):
    k, v = states(2, 64, 24, dtype)
    q, levels = quantise(k, v, bits, 32, 8), 2**bits - 1
    for x, scale, dim in ((k.unflatten(1, (2, 32)), q.k_scale, 2), (v.unflatten(2, (3, 8)), q.v_scale, 3)):
        needed = (x.double().amax(dim) - x.double().amin(dim)) / levels
        assert (scale.double() >= needed * (1 - 1e-6)).all()
        assert (scale.double() <= needed * (1 + torch.finfo(dtype).eps)).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [0.0, -1000.1, 12345.6, 3e-5])
def test_what_is_constant_comes_back_as_it_was(value, bits, dtype):
    same = torch.full((2, 32, 16), value, dtype=dtype)
    for back in dequantise(quantise(same, same, bits), dtype):
        assert torch.equal(back, same)


@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_has_a_place(bits):
    """Integers with scale 1 are restored exactly in every channel."""
    levels, draw = 2**bits, torch.Generator().manual_seed(0)
    k, v = torch.randint(0, levels, (2, 2, 64, 32), generator=draw).float()
    k[:, ::32], k[:, 1::32], v[..., ::16], v[..., 1::16] = 0, levels - 1, 0, levels - 1
    for back, x in zip(dequantise(quantise(k, v, bits, 32, 16), FP32), (k, v), strict=True):
        assert torch.equal(back, x)


@pytest.mark.parametrize("bits", [4, 8])
def test_states_may_have_any_strides_and_codes_are_contiguous(bits):
    k, v = states(2, 32, 16)
    apart = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v)]
    for x, y in zip(quantise(*apart, bits).tensors.values(), quantise(k, v, bits).tensors.values(), strict=True):
        assert torch.equal(x, y)
        assert x.is_contiguous()


def test_a_large_channel_of_keys_and_a_large_token_of_values_cost_the_others_nothing():
    k, v = states(1, 64, 32)
    before = dequantise(quantise(k, v, 4, value_group=16), FP32)
    k[:, :, 3] *= 1e3
    v[:, 7] *= 1e3
    after = dequantise(quantise(k, v, 4, value_group=16), FP32)
    channels, tokens = torch.arange(32) != 3, torch.arange(64) != 7
    assert torch.equal(before[0][..., channels], after[0][..., channels])
    assert torch.equal(before[1][:, tokens], after[1][:, tokens])


@pytest.mark.parametrize("bits", [4, 8])
def test_parts_are_as_good_as_the_whole(bits):
    k, v = states(2, 112, 24, BF16)
    whole = quantise(k, v, bits, 16)
    bounds = [(0, 48), (48, 48), (48, 112)]
    joined = concatenated([quantise(k[:, i:j], v[:, i:j], bits, 16) for i, j in bounds])
    again = concatenated([whole.between(i, j) for i, j in bounds])
    assert len(joined) == len(again) == 112
    for name, tensor in whole.tensors.items():
        assert torch.equal(joined.tensors[name], tensor)
        assert torch.equal(again.tensors[name], tensor)


@pytest.mark.parametrize(("bits", "dtype", "per_element"), [(4, BF16, 5), (8, FP16, 9), (4, FP32, 6), (8, FP32, 10)])
def test_bytes_are_those_of_codes_scales_and_zeros(bits, dtype, per_element):
    q = quantise(*states(2, 96, 128, dtype), bits)
    assert q.nbytes == 2 * (2 * 96 * 128) * per_element // 8
    assert (len(q), q.heads, q.dims, q.value_group) == (96, 2, 128, 32)
    moved = q.to("meta")
    assert moved.nbytes == q.nbytes
    assert all(tensor.is_meta for tensor in moved.tensors.values())


@pytest.mark.parametrize(
    ("dims", "expected"), [(1, 1), (5, 5), (32, 32), (67, 67), (72, 36), (80, 40), (96, 32), (128, 32), (256, 32)]
)
def test_values_are_grouped_by_about_32_channels_that_divide_the_head(dims, expected):
    assert quantise(*states(1, 16, dims), 8, 16).value_group == expected


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("tail", [0, 1, 5])
@pytest.mark.parametrize("bits", [4, 8])
def test_twin_is_attention_over_what_comes_back(bits, tail, biased):
    arguments = case(bits=bits, tail=tail) | ({} if biased else {"bias": None, "tail_bias": None})
    out = attend_quantised_torch(**arguments)
    assert (out.shape, out.dtype) == ((3, 4, 16), FP32)
    assert_near(out, dense(**arguments), 1e-5)


def test_eight_bits_are_near_attention_over_the_originals():
    arguments = case((64, 96), dims=64)
    k, v = states(2, 160, 64)
    arguments["packed"] = quantise(k, v, 8)
    out, fine = attend_quantised_torch(**arguments), []
    for b, (begin, end) in enumerate(pairwise(arguments["starts"].tolist())):
        mask = torch.cat([arguments["bias"][begin:end], arguments["tail_bias"][b]])[None]
        sides = [torch.cat([x[:, begin:end], arguments[name][b]], 1) for x, name in ((k, "tail_k"), (v, "tail_v"))]
        sides = [x.repeat_interleave(2, 0) for x in sides]
        fine.append(F.scaled_dot_product_attention(arguments["q"][b, :, None], *sides, mask)[:, 0])
    assert_near(out, torch.stack(fine), 1e-2)


@pytest.mark.parametrize(
    ("bits", "dtype", "heads", "dims", "groups", "sizes", "tail"),
    [
        (8, FP32, (2, 2), 32, (16, 32), (32, 16), 3),
        (8, FP16, (2, 2), 32, (16, 16), (32, 16), 3),
        (8, BF16, (2, 2), 32, (16, 8), (32, 16), 3),
        (4, FP32, (4, 2), 32, (16, 32), (32, 0, 16), 17),
        (4, FP16, (4, 2), 32, (16, 16), (32, 0, 16), 17),
        (4, BF16, (4, 2), 32, (16, 8), (32, 0, 16), 17),
        (4, BF16, (7, 1), 128, (32, None), (0, 352), 1),  # two chunks
        (8, FP16, (7, 1), 128, (32, None), (64, 32), 0),
        (4, FP16, (3, 1), 80, (64, None), (64, 0), 33),  # halves of 40; a value group spans the middle
        (4, FP32, (2, 1), 22, (16, 22), (16,), 2),
        (8, FP32, (2, 1), 5, (16, None), (16, 32), 4),
        (8, FP32, (1, 1), 1, (16, None), (32,), 1),
        (8, BF16, (1, 1), 136, (32, None), (32,), 2),
        (4, FP32, (1, 1), 256, (16, 64), (16,), 3),
        (4, FP16, (2, 2), 16, (512, None), (0, 512), 2),  # groups longer than a chunk
        (8, FP32, (70, 1), 16, (16, None), (16,), 3),  # two tiles of query heads
        (8, FP32, (2, 1), 16, (16, None), (0, 0), 3),
        (8, FP32, (2, 1), 16, (16, None), (0, 0), 0),
    ],
)
def test_kernel_is_the_twin(bits, dtype, heads, dims, groups, sizes, tail):
    arguments = case(sizes, heads, dims, tail, bits, dtype, *groups)
    out = attend_quantised_triton(**arguments)
    assert (out.shape, out.dtype) == (arguments["q"].shape, dtype)
    assert_near(out, attend_quantised_torch(**arguments), TOLERANCE[dtype])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [4, 8])
def test_no_bias_is_a_bias_of_zero(form, bits):
    arguments = case(bits=bits)
    zeros = {name: torch.zeros_like(arguments[name]) for name in ("bias", "tail_bias")}
    assert_near(form(**{**arguments, "bias": None, "tail_bias": None}), form(**{**arguments, **zeros}), 1e-6)


@pytest.mark.parametrize("limits", [dict(MAX_CHUNKS=2), dict(CHUNKS_AT_ONCE=2)], ids=["long_chunks", "many_chunks"])
def test_kernel_takes_caches_of_any_length(limits, monkeypatch):
    for name, value in {"CHUNK_KEYS": 32, **limits}.items():
        monkeypatch.setattr(quantised_kernel, name, value)
    arguments = case((176, 48), heads=(2, 1), tail=70)
    assert_near(attend_quantised_triton(**arguments), attend_quantised_torch(**arguments), 1e-5)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # of the lowest float32, scaled to base 2
@pytest.mark.parametrize("form", FORMS)
def test_what_absent_places_of_the_tail_hold_does_not_matter(form):
    arguments = case(tail=20)
    arguments["tail_bias"][1] = -1e30  # of the sequence without packed tokens
    clean = form(**arguments)
    absent = arguments["tail_bias"] <= -1e30
    arguments["tail_bias"][absent] = torch.tensor([-1e30, -torch.inf, torch.finfo(FP32).min]).repeat(20)[: absent.sum()]
    for name, garbage in (("tail_k", torch.nan), ("tail_v", torch.inf)):
        arguments[name].masked_fill_(absent[:, None, :, None], garbage)
    out = form(**arguments)
    assert torch.equal(out, clean)
    assert out[1].eq(0.0).all()
    assert out[0].ne(0.0).all()


@pytest.mark.parametrize("form", FORMS)
def test_packed_keys_may_be_absent_too(form):
    arguments = case((32, 32), tail=3)
    arguments["bias"][:16], arguments["bias"][32:] = -1e30, -torch.inf
    arguments["tail_bias"][1] = -torch.inf
    out = form(**arguments)
    assert_near(out, dense(**arguments), 1e-5)
    assert out[1].eq(0.0).all()


@pytest.mark.parametrize("form", FORMS)
def test_biases_and_keys_of_any_size_give_finite_results(form):
    arguments = case((32, 48), tail=4)
    k, v = states(2, 80, 16)
    arguments["packed"] = quantise(k * 2500, v, 8, 16)
    arguments["bias"][:], arguments["bias"][::3] = -1e4, 1e4
    assert_near(form(**arguments), dense(**arguments), 1e-3)


def test_kernel_takes_rows_apart_and_repeats_itself_bit_for_bit(monkeypatch):
    monkeypatch.setattr(quantised_kernel, "CHUNK_KEYS", 32)
    arguments = case((48, 0, 112), tail=40, bits=4, dtype=FP16)
    whole, rows = attend_quantised_triton(**arguments), []
    for b, (begin, end) in enumerate(pairwise(arguments["starts"].tolist())):
        alone = {name: arguments[name][b : b + 1] for name in ("q", "tail_k", "tail_v", "tail_bias")}
        alone |= {"packed": arguments["packed"].between(begin, end), "bias": arguments["bias"][begin:end]}
        rows.append(attend_quantised_triton(**alone, starts=torch.tensor([0, end - begin]), scale=arguments["scale"]))
    assert torch.equal(whole, torch.cat(rows))
    assert torch.equal(whole, attend_quantised_triton(**arguments))
    assert torch.equal(whole, attend_quantised_triton(**arguments, longest=112))


def test_kernel_takes_any_strides_and_writes_everything_it_returns(monkeypatch):
    arguments = case(bits=4)
    expected = attend_quantised_triton(**arguments)
    empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda like, *size, **how: poisoned(empty(like, *size, **how)))
    spread = torch.full((3, 2, 10, 24), torch.nan)  # every other key of a wider cache
    spread[:, :, ::2, 4:20] = arguments["tail_k"]
    apart = {
        "q": arguments["q"].transpose(1, 2).contiguous().transpose(1, 2),  # last dimension not contiguous
        "packed": concatenated([arguments["packed"]] * 2).between(0, 80),
        "starts": arguments["starts"].repeat_interleave(2)[::2],
        "bias": arguments["bias"].repeat_interleave(2)[::2],
        "tail_k": spread[:, :, ::2, 4:20],
        "tail_v": arguments["tail_v"].transpose(1, 2).contiguous().transpose(1, 2),
        "tail_bias": arguments["tail_bias"].T.contiguous().T,
    }
    assert torch.equal(attend_quantised_triton(**{**arguments, **apart}), expected)


def test_kernel_reads_beyond_two_to_the_31_elements(tmp_path):
    """In sparse files, of which only touched pages use disk space."""
    arguments = case((32,), heads=(1, 1), tail=3)
    expected, near, tokens = attend_quantised_triton(**arguments), arguments["packed"], (1 << 27) + 32
    sparse = {}
    for name, tensor in near.tensors.items():
        shape = (1, tokens * tensor.shape[1] // 32, tensor.shape[2])
        sparse[name] = torch.from_file(str(tmp_path / name), True, shape[1] * shape[2], dtype=tensor.dtype).view(shape)
        sparse[name][:, -tensor.shape[1] :] = tensor
    assert sparse["k_codes"].numel() > 1 << 31
    rows = torch.from_file(str(tmp_path / "tail"), True, (2 << 30) + 32, dtype=FP32)
    tail = rows.as_strided((2, 1, 1, 3, 16), (16, 0, 0, 1 << 30, 1))
    tail.copy_(torch.stack([arguments["tail_k"], arguments["tail_v"]]))
    far = {
        "packed": Quantised(8, 16, **sparse),
        "starts": torch.tensor([tokens - 32, tokens]),
        "tail_k": tail[0],
        "tail_v": tail[1],
    }
    biases = torch.from_file(str(tmp_path / "bias"), True, tokens)
    biases[-32:] = arguments["bias"]
    for file in tmp_path.iterdir():
        file.unlink()
    assert torch.equal(attend_quantised_triton(**{**arguments, **far, "bias": biases}, longest=32), expected)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_in_nothing_out(form):
    assert form(**case((), tail=3)).shape == (0, 4, 16)


@pytest.mark.parametrize("form", FORMS)
def test_result_carries_no_gradient(form):
    arguments = case((16,))
    for name in ("q", "tail_k", "tail_v"):
        arguments[name].requires_grad_()
    assert not form(**arguments).requires_grad
    k, v = states(1, 16, 16)
    assert not quantise(k.requires_grad_(), v.requires_grad_(), 8, 16).k_zero.requires_grad


@pytest.mark.parametrize(("choice", "form"), [("torch", attend_quantised_torch), ("triton", attend_quantised_triton)])
def test_form_is_chosen_by_dispatch(choice, form, monkeypatch):
    monkeypatch.setenv("LIGHTKV_OPS", choice)
    arguments = case()
    assert torch.equal(attend_quantised(**arguments), form(**arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=torch.zeros(2, 32, 8).double()), "share a dtype"),
        (dict(v=torch.zeros(2, 32, 8).half()), "share a dtype"),
        (dict(v=torch.zeros(2, 32, 16)), r"expected k, v \[Hkv, N, d\]"),
        (dict(k=torch.zeros(2, 32, 257), v=torch.zeros(2, 32, 257)), "1 to 256"),
        (dict(bits=5), r"one of \(4, 8\), got 5"),
        (dict(bits=4, k=torch.zeros(2, 32, 7), v=torch.zeros(2, 32, 7)), "even head dimension, got 7"),
        (dict(group=24), "power of two of at least 16, got 24"),
        (dict(group=8), "power of two of at least 16, got 8"),
        (dict(k=torch.zeros(2, 33, 8), v=torch.zeros(2, 33, 8)), "expected a multiple of 16 tokens, got 33"),
        (dict(value_group=3), "divide the head dimension, 8, got 3"),
    ],
)
def test_what_cannot_be_quantised_is_refused(change, message):
    fits = dict(k=torch.zeros(2, 32, 8), v=torch.zeros(2, 32, 8), bits=8, group=16, value_group=4)
    quantise(**fits)
    with pytest.raises(ConfigError, match=message):
        quantise(**{**fits, **change})


def test_parts_that_differ_or_are_cut_within_a_group_are_refused():
    k, v = states(1, 32, 16)
    with pytest.raises(ConfigError, match="expected parts of one"):
        concatenated([quantise(k, v, 8), quantise(k, v, 4)])
    with pytest.raises(ConfigError, match="expected parts of one"):
        concatenated([])
    with pytest.raises(ConfigError, match="expected multiples of 32 tokens, got 16 to 32"):
        quantise(k, v, 8).between(16, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=torch.zeros(3, 4, 16).double()), "share a dtype"),
        (dict(tail_v=torch.zeros(3, 2, 5, 16).half()), "share a dtype"),
        (dict(q=torch.zeros(3, 4, 8)), r"expected q \[B, Hq, 16\]"),
        (dict(q=torch.zeros(3, 5, 16)), "multiple of the 2 key heads, got 5"),
        (dict(q=torch.zeros(2, 4, 16)), r"expected tail.k, tail.v \[2, 2, T, 16\]"),
        (dict(tail_v=torch.zeros(3, 2, 4, 16)), r"got \[3, 2, 5, 16\], \[3, 2, 4, 16\]"),
        (dict(tail_k=torch.zeros(3, 5, 16)), r"expected tail.k, tail.v"),
        (dict(starts=torch.zeros(4)), r"starts must be torch.int64 \[4\]"),
        (dict(starts=torch.tensor([0, 32, 80])), r"got torch.int64 \[3\]"),
        (dict(bias=torch.zeros(81)), r"bias must be torch.float32 \[80\]"),
        (dict(tail_bias=torch.zeros(3, 5).half()), r"tail.bias must be torch.float32 \[3, 5\]"),
        (dict(starts=torch.tensor([0, 32, 32, 64])), "from 0 to the 80 packed tokens"),
        (dict(starts=torch.tensor([0, 32, 16, 80])), "starts must ascend"),
        (dict(starts=torch.tensor([0, 8, 16, 80])), "multiples of 16 tokens, got 0 to 8"),
        (dict(longest=47), "at least the longest sequence, 48, got 47"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    fits = case()
    attend_quantised(**fits)
    with pytest.raises(ConfigError, match=message):
        attend_quantised(**{**fits, **change})


@pytest.mark.parametrize(
    ("bits", "name", "dtype", "dims", "value_group"),
    [(4, "bf16", BF16, 128, 32), (8, "fp32", FP32, 80, 40)],
)
def test_kernel_compiles(bits, name, dtype, dims, value_group):
    tiles = quantised_tiles(dims, dtype, 7, 32)
    constants = dict(ROWS=7, D=dims, BITS=bits, GROUP=32, VALUE_GROUP=value_group)
    constants |= {name: size for name, size in tiles.items() if name.startswith("BLOCK")}
    packed = {"codes": "*u8", "scale": f"*{name}", "zero": f"*{name}"}
    signature = {
        "q": f"*{name}",
        **{f"{side}_{part}": kind for side in "kv" for part, kind in packed.items()},
        **{"starts": "*i64", "bias": "*fp32", "tail_k": f"*{name}", "tail_v": f"*{name}", "tail_bias": "*fp32"},
        **dict.fromkeys(("tops", "totals", "accs"), "*fp32"),
        "scale": "fp32",
        **dict.fromkeys(("tokens", "tail", "chunk", "parts", "tail_parts", "key_heads"), "i32"),
        **dict.fromkeys(("q_batch", "q_head", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row"), "i64"),
        **dict.fromkeys(constants, "constexpr"),
    }
    options = {name: tiles[name] for name in ("num_warps", "num_stages")}
    compile_kernel("lightkv.ops.quantised_kernel", "quantised_kernel", signature, constants, **options)


def test_combining_kernel_compiles():
    signature = {**dict.fromkeys(["tops", "totals", "accs"], "*fp32"), "out": "*bf16", "parts": "i32"}
    constants = {"D": 128, "BLOCK_D": 128, "BLOCK_C": 32}
    signature |= dict.fromkeys(constants, "constexpr")
    compile_kernel("lightkv.ops.quantised_kernel", "combine_parts_kernel", signature, constants, num_warps=4)
