import pytest
import torch
from torch import Tensor

from lightkv.errors import ConfigError
from lightkv.ops import merge as operation
from lightkv.ops.merge import merge, merge_torch
from lightkv.ops.merge_kernel import BLOCK_D, BLOCK_R, merge_triton
from tests.lightkv.ops.offline import compile_kernel

FORMS = pytest.mark.parametrize("form", [merge_torch, merge_triton])
DTYPES = pytest.mark.parametrize(
    ("dtype", "close"),
    [(torch.float32, 1e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-11)],  # Triton's interpreter truncates to bf16
)
ROWS = 40


def case(width: int = 37, dtype: torch.dtype = torch.float32, pairs: int = 20, receivers: int = 6) -> list[Tensor]:
    """Returns [hidden, weight, source, target]. Target 0 has the longest run; the last rows are not used."""
    random = torch.Generator().manual_seed(width + pairs)
    hidden = torch.randn(ROWS, width, generator=random).to(dtype)
    weight = torch.rand(ROWS, generator=random) + 0.1
    rows = torch.randperm(ROWS - 5, generator=random)
    target = rows[:receivers][torch.randint(0, receivers, (pairs,), generator=random)]
    target[: pairs // 2] = rows[0]
    return [hidden, weight, rows[receivers:][:pairs], target]


def after(form, hidden: Tensor, weight: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    hidden, weight = hidden.clone(), weight.clone()
    assert form(hidden, weight, source, target) is None
    return hidden, weight


def naive(hidden: Tensor, weight: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """`merge` in fp64, one receiver at a time."""
    new_hidden, new_weight = hidden.double(), weight.double()
    for b in set(target.tolist()):
        members = [b, *source[target == b].tolist()]
        shares = weight[members].double()
        new_weight[b] = shares.sum()
        shares = torch.ones_like(shares) if not new_weight[b] else shares
        new_hidden[b] = (shares[:, None] * hidden[members].double()).sum(dim=0) / shares.sum()
    return new_hidden, new_weight


def survivors(source: Tensor) -> Tensor:
    return torch.ones(ROWS, dtype=torch.bool).index_fill(0, source, False)


@FORMS
@DTYPES
@pytest.mark.parametrize(("width", "pairs", "receivers"), [(37, 20, 6), (1, 9, 1), (BLOCK_D + 3, 5, 5)])
def test_receivers_become_the_weighted_means_of_their_members(form, dtype, close, width, pairs, receivers):
    call = case(width, dtype, pairs, receivers)
    hidden, weight = after(form, *call)
    expected_hidden, expected_weight = naive(*call)
    torch.testing.assert_close(hidden.double(), expected_hidden, rtol=close, atol=close)
    torch.testing.assert_close(weight.double(), expected_weight, rtol=1e-6, atol=0)


@DTYPES
def test_the_kernel_equals_the_twin(dtype, close):
    call = case(dtype=dtype)
    (hidden, weight), (expected_hidden, expected_weight) = after(merge_triton, *call), after(merge_torch, *call)
    torch.testing.assert_close(hidden, expected_hidden, rtol=close, atol=close)
    assert weight.equal(expected_weight)


@FORMS
@DTYPES
def test_the_weighted_sum_over_the_survivors_is_what_it_was_over_all(form, dtype, close):
    call = case(dtype=dtype)
    before = (call[0].double() * call[1][:, None]).sum(dim=0)
    hidden, weight = after(form, *call)
    left = survivors(call[2])
    now = (hidden.double() * weight[:, None])[left].sum(dim=0)
    torch.testing.assert_close(now, before, rtol=0, atol=close * float(call[1].sum()))


@FORMS
def test_whole_weights_add_up_exactly(form):
    hidden, _, source, target = case()
    weight = torch.arange(1.0, ROWS + 1)
    _, merged = after(form, hidden, weight, source, target)
    assert merged[survivors(source)].sum() == weight.sum()


@FORMS
@DTYPES
def test_rows_that_nothing_merges_into_keep_their_bits(form, dtype, close):
    call = case(dtype=dtype)
    call[0][-1] = torch.nan
    hidden, weight = after(form, *call)
    rest = torch.ones(ROWS, dtype=torch.bool).index_fill(0, call[3], False)
    torch.testing.assert_close(hidden[rest], call[0][rest], rtol=0, atol=0, equal_nan=True)
    assert weight[rest].equal(call[1][rest])
    assert not hidden[~rest].isnan().any()


@FORMS
def test_members_without_any_weight_weigh_the_same(form):
    hidden, weight, source, target = case()
    weight[:] = 0
    weight[target[-1]] = 2.0
    merged, total = after(form, hidden, weight, source, target)
    expected, _ = naive(hidden, weight, source, target)
    torch.testing.assert_close(merged.double(), expected, rtol=1e-6, atol=1e-6)
    assert total.equal(weight)


@FORMS
def test_sums_run_by_ascending_pair_wherever_the_pairs_of_a_receiver_stand(form):
    hidden, weight = torch.ones(6, 3), torch.tensor([1.0, 2.0**24, 1.0, 1.0, 5.0, 7.0])
    forward, backward = (
        after(form, hidden, weight, torch.tensor(source), torch.tensor([0, 4, 0, 0]))[1][0]
        for source in ([1, 5, 2, 3], [3, 5, 2, 1])
    )
    assert forward == 2.0**24  # 1 + 2²⁴, rounded to even; then 1 and 1, each lost
    assert backward == 2.0**24 + 4  # 3 + 2²⁴, rounded to even


@FORMS
def test_receivers_merge_together_as_they_would_one_by_one(form):
    hidden, weight, source, target = case()
    one_by_one = hidden, weight
    for b in set(target.tolist()):
        one_by_one = after(form, *one_by_one, source[target == b], target[target == b])
    together = after(form, hidden, weight, source, target)
    for a, b in zip(together, one_by_one, strict=True):
        assert a.equal(b)


@FORMS
def test_rows_that_lie_apart_in_memory_are_merged_in_place(form):
    hidden, weight, source, target = case(width=11)
    rows = torch.full((2 * ROWS, 33), 3.0)
    weights = torch.full((2 * ROWS,), 3.0)
    apart, loads = rows[::2, ::3].copy_(hidden), weights[::2].copy_(weight)
    form(apart, loads, source, target)
    for found, expected in zip((apart, loads), after(form, hidden, weight, source, target), strict=True):
        assert found.equal(expected)
    assert (rows[1::2] == 3).all()
    assert (rows[:, 1::3] == 3).all()
    assert (weights[1::2] == 3).all()


@pytest.mark.parametrize("far", ["rows", "columns"])
def test_the_kernel_merges_beyond_two_to_the_31_elements(far, tmp_path):
    """In a sparse file, of which only touched pages use disk space."""
    hidden, weight = torch.arange(81.0).view(9, 9).half(), torch.ones(9)
    source, target = torch.tensor([8, 0, 6]), torch.tensor([7, 7, 1])
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=9 << 29, dtype=torch.float16)
    (tmp_path / "sparse").unlink()
    place = memory.as_strided((9, 9), (1 << 29, 1) if far == "rows" else (1, 1 << 29)).copy_(hidden)
    merge_triton(place, weight.clone(), source, target)
    assert place.equal(after(merge_torch, hidden, weight, source, target)[0])


@FORMS
def test_without_pairs_nothing_changes(form):
    hidden, weight, _, _ = case()
    none = torch.zeros(0, dtype=torch.int64)
    merged, total = after(form, hidden, weight, none, none)
    assert merged.equal(hidden)
    assert total.equal(weight)


@FORMS
def test_one_receiver_may_take_more_than_a_block_of_pairs(form):
    rows = BLOCK_R + 20
    hidden, weight = torch.arange(float(rows))[:, None].repeat(1, 2), torch.ones(rows)
    source, target = torch.arange(2, rows), torch.ones(rows - 2, dtype=torch.int64)
    target[[3, 50]] = 0
    form(hidden, weight, source, target)
    assert weight[:2].tolist() == [3, rows - 3]
    sums = (5 + 52, rows * (rows - 1) / 2 - 5 - 52)
    torch.testing.assert_close(hidden[:2, 0], torch.tensor([sums[0] / 3, sums[1] / (rows - 3)]), rtol=1e-5, atol=0)


def test_the_twin_merges_the_same_in_slices_of_any_width(monkeypatch):
    call = case()
    expected = after(merge_torch, *call)
    monkeypatch.setattr(operation, "FEATURES_AT_ONCE", 20)
    for a, b in zip(after(merge_torch, *call), expected, strict=True):
        assert a.equal(b)


@FORMS
def test_a_second_run_gives_the_same_bits(form):
    call = case()
    for a, b in zip(after(form, *call), after(form, *call), strict=True):
        assert a.equal(b)


@pytest.mark.parametrize("choice", ["torch", "triton"])
def test_the_operation_is_the_form_that_the_environment_asks_for(monkeypatch, choice):
    call, asked = case(), []
    module = operation if choice == "torch" else __import__("lightkv.ops.merge_kernel", fromlist=["merge_triton"])
    monkeypatch.setattr(module, f"merge_{choice}", lambda *given: asked.append(given))
    monkeypatch.setenv("LIGHTKV_OPS", choice)
    merge(*call)
    assert asked == [tuple(call)]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"hidden": torch.ones(3)}, "hidden must be"),
        ({"hidden": torch.ones(3, 4, dtype=torch.int32)}, "hidden must be"),
        ({"weight": torch.ones(3, dtype=torch.float16)}, r"weight must be fp32 \[3\]"),
        ({"weight": torch.ones(2)}, r"weight must be fp32 \[3\]"),
        ({"source": torch.tensor([1], dtype=torch.int32)}, "source must be int64"),
        ({"target": torch.tensor([[0]])}, "target must be int64"),
        ({"target": torch.tensor([0, 0])}, "must have the same length, got 1 and 2"),
    ],
)
def test_arguments_that_cannot_be_right_are_refused(wrong, words):
    right = {"hidden": torch.ones(3, 4), "weight": torch.ones(3), "source": torch.tensor([1])}
    right["target"] = torch.tensor([0])
    merge(**right)
    with pytest.raises(ConfigError, match=words):
        merge(**right | wrong)


def test_weights_compile_for_gpus_with_64_bit_strides():
    signature = {"weight": "*fp32", "source": "*i64", "target": "*i64", "stop": "*i64", "stride": "i64", "pairs": "i64"}
    signature["BLOCK_R"] = "constexpr"
    assert compile_kernel("lightkv.ops.merge_kernel", "weigh_kernel", signature, {"BLOCK_R": BLOCK_R}, num_warps=4) == 0


def test_means_compile_for_gpus_with_64_bit_strides():
    signature = {"hidden": "*bf16", "weight": "*fp32", "own": "*fp32", "source": "*i64", "target": "*i64"}
    signature |= {"stop": "*i64", "stride_s": "i64", "stride_d": "i64", "stride_w": "i64", "width": "i32"}
    signature["BLOCK_D"] = "constexpr"
    assert compile_kernel("lightkv.ops.merge_kernel", "mean_kernel", signature, {"BLOCK_D": BLOCK_D}, num_warps=2) == 0
