import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightkv.errors import ConfigError
from lightkv.ops import attend as operation
from lightkv.ops import attend_kernel
from lightkv.ops.attend import attend, attend_fused, attend_torch
from lightkv.ops.attend_kernel import attend_triton, decode_tiles, prefill_tiles
from tests.lightkv.ops.offline import compile_kernel

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
TOLERANCE = {FP32: 1e-5, FP16: 2e-3, BF16: 2e-2}  # Triton's interpreter truncates to bf16, GPUs round
FORMS = [attend_torch, attend_triton]


def inputs(batch, heads, key_heads, length, keys, dims, dtype=torch.float32, seed=0):
    """Returns q, k, v as transformers passes them, views of [B, L, H, d], and a bias per key."""
    draw = torch.Generator().manual_seed(seed)
    sizes = ((length, heads), (keys, key_heads), (keys, key_heads))
    q, k, v = (torch.randn(batch, *size, dims, generator=draw).to(dtype).transpose(1, 2) for size in sizes)
    return q, k, v, torch.randint(1, 300, (batch, keys), generator=draw).float().log()


def dense(q, k, v, bias, first, scale):
    """PyTorch's attention in fp64 with a dense additive mask; undefined for queries that see no key."""
    length, keys, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    column, position = torch.arange(keys), torch.arange(keys - length, keys)
    first = torch.zeros(len(q), dtype=torch.int64) if first is None else first
    seen = (column <= position[:, None]) & (column >= first[:, None, None])
    mask = (0.0 if bias is None else bias.double()[:, None]) + torch.zeros(seen.shape).double()
    mask = mask.masked_fill(~seen, -torch.inf)[:, None]
    k, v = (states.double().repeat_interleave(group, 1) for states in (k, v))
    out = F.scaled_dot_product_attention(q.double(), k, v, attn_mask=mask, scale=scale)
    return out.nan_to_num().masked_fill(~seen.any(-1)[:, None, :, None], 0.0).transpose(1, 2)


def poisoned(memory: Tensor) -> Tensor:
    return memory.fill_(torch.nan) if memory.is_floating_point() else memory


def assert_near(out: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(out.double(), expected.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("first", [None, [0, 4], [9, 0]], ids=["whole", "padded", "wholly_padded"])
@pytest.mark.parametrize(("length", "keys"), [(9, 9), (4, 9), (1, 9), (1, 1)])
def test_twin_is_attention_under_a_dense_mask(length, keys, first, biased, monkeypatch):
    monkeypatch.setattr(operation, "SCORES_AT_ONCE", 2 * 6 * 9 * 3)  # three queries at a time
    q, k, v, bias = inputs(2, 6, 2, length, keys, 20)
    first, bias = first and torch.tensor(first).clamp(max=keys), bias if biased else None
    out = attend_torch(q, k, v, bias, first, 0.3)
    assert (out.shape, out.dtype) == ((2, length, 6, 20), FP32)
    assert_near(out, dense(q, k, v, bias, first, 0.3), 1e-5)


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize(("length", "keys"), [(9, 9), (4, 9), (1, 9), (1, 1)])
def test_torchs_own_attention_is_the_twins(length, keys, biased, monkeypatch):
    monkeypatch.setattr(operation, "MASK_AT_ONCE", 2 * 9 * 3)  # three queries at a time
    q, k, v, bias = inputs(2, 6, 2, length, keys, 20)
    bias[1, 0] = -1e30  # masked out
    bias = bias if biased else None
    out = attend_fused(q, k, v, bias, 0.3)
    assert (out.shape, out.dtype) == ((2, length, 6, 20), FP32)
    assert_near(out, attend_torch(q, k, v, bias, None, 0.3), 1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [20, 1], ids=["prefill", "decode"])
def test_a_key_of_bias_log_n_is_heard_like_n_copies(form, length):
    q, k, v, _ = inputs(1, 2, 1, length, 30, 16)
    same = torch.tensor([0, 1, 1, 1, 2, 3, 3, *range(4, 30)])  # 33 keys are copies of 30; the queries come after them
    many = form(q, k[:, :, same], v[:, :, same], None, None, 0.3)
    few = form(q, k, v, torch.bincount(same).float().log()[None], None, 0.3)
    assert_near(few[:, -min(length, 26) :], many[:, -min(length, 26) :], 1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [20, 1], ids=["prefill", "decode"])
def test_no_bias_is_a_bias_of_zero(form, length):
    q, k, v, bias = inputs(2, 2, 2, length, 20, 16)
    assert_near(form(q, k, v, None, None, 0.3), form(q, k, v, torch.zeros_like(bias), None, 0.3), 1e-6)


@pytest.mark.parametrize(
    ("heads", "key_heads", "length", "keys", "dims", "first", "dtype"),
    [
        (2, 2, 17, 17, 32, None, FP32),
        (2, 2, 17, 17, 32, None, FP16),
        (2, 2, 17, 17, 32, None, BF16),
        (1, 1, 65, 130, 80, [0, 70], FP32),
        (2, 1, 65, 130, 80, [0, 70], BF16),
        (7, 1, 20, 33, 96, [3, 0], FP16),
        (2, 2, 130, 130, 128, [0, 129], BF16),  # two tiles of queries; the second has full tiles of keys
        (1, 1, 33, 65, 128, [0, 40], FP32),
        (2, 1, 17, 65, 136, [65, 7], FP16),
        (1, 1, 18, 40, 256, [1, 0], FP32),
    ],
)
def test_prefill_kernel_is_the_twin(heads, key_heads, length, keys, dims, first, dtype):
    q, k, v, bias = inputs(2, heads, key_heads, length, keys, dims, dtype)
    first = None if first is None else torch.tensor(first)
    out = attend_triton(q, k, v, bias, first, dims**-0.5)
    assert (out.shape, out.dtype) == ((2, length, heads, dims), dtype)
    assert_near(out, attend_torch(q, k, v, bias, first, dims**-0.5), TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("heads", "key_heads", "length", "keys", "dims", "first", "dtype"),
    [
        (2, 2, 1, 1, 32, None, FP32),
        (2, 1, 3, 3, 80, [0, 2], FP32),
        (2, 1, 3, 3, 80, [0, 2], FP16),
        (2, 1, 3, 3, 80, [0, 2], BF16),
        (7, 1, 1, 130, 96, [3, 0], BF16),
        (4, 1, 5, 65, 32, [0, 63], FP16),
        (4, 2, 1, 600, 128, [0, 590], BF16),  # three chunks
        (2, 1, 1, 600, 128, [0, 590], FP32),
        (2, 1, 2, 257, 136, [257, 0], FP16),
        (1, 1, 1, 20, 256, [1, 0], FP32),
    ],
)
def test_decode_kernel_is_the_twin(heads, key_heads, length, keys, dims, first, dtype):
    q, k, v, bias = inputs(2, heads, key_heads, length, keys, dims, dtype)
    first = None if first is None else torch.tensor(first)
    out = attend_triton(q, k, v, bias, first, dims**-0.5)
    assert (out.shape, out.dtype) == ((2, length, heads, dims), dtype)
    assert_near(out, attend_torch(q, k, v, bias, first, dims**-0.5), TOLERANCE[dtype])


def test_decode_kernel_takes_many_rows_per_key_head_in_tiles():
    q, k, v, bias = inputs(1, 7, 1, 10, 30, 32)
    assert decode_tiles(32, FP32, rows=70)["BLOCK_M"] == 64
    assert_near(attend_triton(q, k, v, bias, None, 0.3), attend_torch(q, k, v, bias, None, 0.3), 1e-5)


@pytest.mark.parametrize("limits", [dict(MAX_CHUNKS=2), dict(CHUNKS_AT_ONCE=2)], ids=["long_chunks", "many_chunks"])
def test_decode_kernel_takes_caches_of_any_length(limits, monkeypatch):
    for name, value in limits.items():
        monkeypatch.setattr(attend_kernel, name, value)
    q, k, v, bias = inputs(2, 2, 1, 1, 1100, 16)
    first = torch.tensor([0, 700])
    assert_near(attend_triton(q, k, v, bias, first, 0.3), attend_torch(q, k, v, bias, first, 0.3), 1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [35, 5], ids=["prefill", "decode"])
def test_what_padding_holds_does_not_matter(form, length):
    q, k, v, bias = inputs(2, 1, 1, length, 35, 16)
    first = torch.tensor([33, 0])
    clean = form(q, k, v, bias, first, 0.3)
    k[0, :, :33], v[0, :, :33], bias[0, :33] = torch.nan, torch.inf, torch.nan
    q[0, :, : length - 2] = torch.nan  # queries that are padding
    out = form(q, k, v, bias, first, 0.3)
    assert torch.equal(out, clean)
    assert out[0, : length - 2].eq(0.0).all()
    assert out[0, length - 2 :].ne(0.0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [40, 1], ids=["prefill", "decode"])
def test_biases_of_any_size_give_finite_results(form, length):
    q, k, v, bias = inputs(1, 1, 1, length, 40, 16)
    bias[:] = -1e4
    bias[:, ::3] = 1e4
    assert_near(form(q, k, v, bias, None, 0.3), dense(q, k, v, bias, None, 0.3), 1e-3)
    assert form(q, k, v, torch.full_like(bias, -torch.inf), None, 0.3).eq(0.0).all()


@pytest.mark.parametrize("length", [40, 1], ids=["prefill", "decode"])
def test_kernel_takes_rows_apart_and_repeats_itself_bit_for_bit(length):
    q, k, v, bias = inputs(3, 2, 1, length, 260, 16, FP16)
    first = torch.tensor([0, 240, 33])
    whole = attend_triton(q, k, v, bias, first, 0.3)
    rows = [attend_triton(*(x[row : row + 1] for x in (q, k, v, bias, first)), 0.3) for row in range(3)]
    assert torch.equal(whole, torch.cat(rows))
    assert torch.equal(whole, attend_triton(q, k, v, bias, first, 0.3))


@pytest.mark.parametrize("length", [20, 2], ids=["prefill", "decode"])
def test_kernel_takes_any_strides_and_writes_everything_it_returns(length, monkeypatch):
    q, k, v, bias = inputs(2, 4, 2, length, 20, 16)
    first = torch.tensor([0, 6])
    expected = attend_triton(q, k, v, bias, first, 0.3)
    empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda like, *size, **how: poisoned(empty(like, *size, **how)))
    spread = torch.full((2, 2, 40, 24), torch.nan)  # every other key of a wider cache
    spread[:, :, ::2, 4:20] = k
    apart = v.transpose(2, 3).contiguous().transpose(2, 3)  # last dimension not contiguous
    biases = bias.T.contiguous().T
    out = attend_triton(q.contiguous(), spread[:, :, ::2, 4:20], apart, biases, first.repeat_interleave(2)[::2], 0.3)
    assert torch.equal(out, expected)
    shared = bias[:1].expand(2, -1)
    assert torch.equal(
        attend_triton(q, k, v, shared, None, 0.3), attend_triton(q, k, v, shared.contiguous(), None, 0.3)
    )


@pytest.mark.parametrize("length", [18, 1], ids=["prefill", "decode"])
def test_kernel_reads_beyond_two_to_the_31_elements(length, tmp_path):
    """In a sparse file, of which only touched pages use disk space."""
    q, k, v, bias = inputs(1, 1, 1, length, 18, 16, FP16)
    expected, apart, file = attend_triton(q, k, v, bias, None, 0.3), 1 << 27, tmp_path / "sparse"
    memory = torch.from_file(str(file), shared=True, size=18 * apart, dtype=FP16)
    file.unlink()
    far = memory.as_strided((2, 1, 1, 18, 16), (16, 1, 1, apart, 1))
    far.copy_(torch.stack([k, v]))
    assert torch.equal(attend_triton(q, far[0], far[1], bias, None, 0.3), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("batch", "length", "keys"), [(0, 3, 3), (2, 0, 3), (2, 0, 0)])
def test_nothing_in_nothing_out(form, batch, length, keys):
    q, k, v, bias = inputs(batch, 2, 1, length, keys, 16)
    assert form(q, k, v, bias, torch.zeros(batch, dtype=torch.int64), 0.3).shape == (batch, length, 2, 16)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [17, 1], ids=["prefill", "decode"])
def test_result_carries_no_gradient(form, length):
    q, k, v, bias = inputs(1, 1, 1, length, 17, 16)
    assert not form(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), bias, None, 0.3).requires_grad


@pytest.mark.parametrize(("choice", "form"), [("torch", attend_torch), ("triton", attend_triton)])
def test_form_is_chosen_by_dispatch(choice, form, monkeypatch):
    monkeypatch.setenv("LIGHTKV_OPS", choice)
    q, k, v, bias = inputs(1, 2, 1, 3, 5, 16)
    assert torch.equal(attend(q, k, v, bias, None, 0.3), form(q, k, v, bias, None, 0.3))


def test_cpus_have_torchs_own_attention_but_for_padding_and_small_types(monkeypatch):
    monkeypatch.delenv("LIGHTKV_OPS", raising=False)
    q, k, v, bias = inputs(1, 2, 1, 3, 5, 16)
    assert torch.equal(attend(q, k, v, bias, None, 0.3), attend_fused(q, k, v, bias, 0.3))
    padded = torch.tensor([2])
    assert torch.equal(attend(q, k, v, bias, padded, 0.3), attend_torch(q, k, v, bias, padded, 0.3))
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    assert torch.equal(attend(q, k, v, bias, None, 0.3), attend_torch(q, k, v, bias, None, 0.3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=torch.zeros(2, 4, 5, 8, dtype=torch.float64)), "share a dtype"),
        (dict(k=torch.zeros(2, 2, 5, 8).half()), "share a dtype"),
        (dict(v=torch.zeros(2, 2, 5, 16)), r"expected q \[B, Hq, L, d\]"),
        (dict(q=torch.zeros(3, 4, 5, 8)), "share the batch"),
        (dict(q=torch.zeros(2, 3, 5, 8)), "multiple of key heads"),
        (dict(q=torch.zeros(2, 4, 6, 8)), "at most as many queries as keys"),
        (dict(bias=torch.zeros(2, 5).half()), r"bias must be float32 \[2, 5\], got torch.float16"),
        (dict(bias=torch.zeros(2, 4)), r"got torch.float32 \[2, 4\]"),
        (dict(first=torch.zeros(2)), r"first must be int64 \[2\]"),
        (dict(first=torch.zeros(1, dtype=torch.int64)), r"first must be int64 \[2\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    fits = dict(q=torch.zeros(2, 4, 5, 8), k=torch.zeros(2, 2, 5, 8), v=torch.zeros(2, 2, 5, 8), bias=None, first=None)
    attend(**fits, scale=1.0)
    with pytest.raises(ConfigError, match=message):
        attend(**{**fits, **change}, scale=1.0)


def test_heads_wider_than_registers_hold_are_refused():
    wide = torch.zeros(1, 1, 1, 257)
    with pytest.raises(ConfigError, match="1 to 256"):
        attend(wide, wide, wide, None, None, 1.0)


COMPILED = pytest.mark.parametrize(
    ("name", "dtype", "packed"), [("bf16", BF16, False), ("fp32", FP32, False), ("bf16", BF16, True)]
)
STRIDES = dict.fromkeys(
    [f"{name}_{axis}" for name in "qkv" for axis in ("batch", "head", "row")] + ["bias_batch", "bias_key"], "i64"
)
SPLIT = {"FEW": 16, "CHUNK": 256, "CHUNKS": 128}


def sides(packed: bool) -> dict[str, str]:
    """Types of `first` and `starts`; the form that lacks an argument passes the constant None."""
    of_batch, of_packed = ("constexpr", "*i64") if packed else ("*i64", "constexpr")
    return {"first": of_batch, "starts_q": of_packed, "starts_k": of_packed}


def compile_form(kernel: str, signature: dict[str, str], constants: dict[str, int], **options: int) -> None:
    signature |= dict.fromkeys(constants, "constexpr")
    nothing = {name: None for name, kind in signature.items() if kind == "constexpr"}
    compile_kernel("lightkv.ops.attend_kernel", kernel, signature, {**nothing, **constants}, **options)


def compile_tiled(
    kernel: str, name: str, packed: bool, middle: dict[str, str], constants: dict[str, int], tiles: dict[str, int]
) -> None:
    options = {name: tiles[name] for name in ("num_warps", "num_stages")}
    blocks = {name: tiles[name] for name in tiles if name.startswith("BLOCK")}
    signature = {**dict.fromkeys("qkv", f"*{name}"), "bias": "*fp32", **sides(packed), **middle}
    compile_form(kernel, signature, {"GROUP": 7, "D": 128, **constants, **blocks}, **options)


@COMPILED
def test_prefill_kernel_compiles(name, dtype, packed):
    sizes = dict.fromkeys(["most_q", "most_k", "key_heads"], "i32")
    middle = {"out": f"*{name}", "scale": "fp32", **sizes, **STRIDES, "out_batch": "i64"}
    compile_tiled("prefill_kernel", name, packed, middle, {"FEW": 16}, prefill_tiles(128, dtype))


@COMPILED
def test_decode_kernel_compiles(name, dtype, packed):
    partial = dict.fromkeys(["tops", "totals", "accs"], "*fp32")
    sizes = dict.fromkeys(["most_q", "most_k", "chunks", "slots", "key_heads"], "i32")
    middle = {**partial, "scale": "fp32", **sizes, **STRIDES}
    compile_tiled("decode_kernel", name, packed, middle, SPLIT, decode_tiles(128, dtype, 7))


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_combine_kernel_compiles(packed):
    signature = {
        **dict.fromkeys(["tops", "totals", "accs"], "*fp32"),
        "starts_q": sides(packed)["starts_q"],
        "starts_k": sides(packed)["starts_k"],
        "out": "*bf16",
        **dict.fromkeys(["most_q", "most_k", "slots", "heads"], "i32"),
        "out_batch": "i64",
    }
    compile_form("combine_kernel", signature, {"D": 128, **SPLIT, "BLOCK_D": 128, "BLOCK_C": 32}, num_warps=4)
