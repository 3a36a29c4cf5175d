import pytest
import torch
from torch import Tensor

from lightkv.errors import ConfigError
from lightkv.ops import compact as operation
from lightkv.ops.compact import compact, compact_torch
from lightkv.ops.compact_kernel import compact_triton
from lightkv.ops.merge import merge_torch
from lightkv.ops.merge_kernel import BLOCK_D, merge_triton
from tests.lightkv.ops import test_merge
from tests.lightkv.ops.offline import compile_kernel
from tests.lightkv.ops.test_merge import DTYPES, ROWS

FORMS = pytest.mark.parametrize("form", [compact_torch, compact_triton])
PAIRS = pytest.mark.parametrize(("form", "merge"), [(compact_torch, merge_torch), (compact_triton, merge_triton)])
SIZES = pytest.mark.parametrize(
    ("width", "pairs", "receivers"), [(37, 20, 6), (1, 9, 1), (BLOCK_D + 3, 5, 5), (0, 4, 2)]
)
Call = list[Tensor]


def case(width: int = 37, dtype: torch.dtype = torch.float32, pairs: int = 20, receivers: int = 6, integers=3) -> Call:
    """Returns [hidden, weight, source, target, kept, columns]. Target 0 has the longest run; some rows are not used."""
    hidden, weight, source, target = test_merge.case(width, dtype, pairs, receivers)
    random = torch.Generator().manual_seed(width + pairs)
    columns = torch.randint(-(1 << 40), 1 << 40, (integers, ROWS), generator=random)
    return [hidden, weight, source, target, rest(source), columns]


def rest(source: Tensor) -> Tensor:
    """Positions of the survivors."""
    return torch.nonzero(test_merge.survivors(source)).flatten()


def in_two_steps(merge, hidden: Tensor, weight: Tensor, source: Tensor, target: Tensor, kept: Tensor, columns: Tensor):
    hidden, weight = hidden.clone(), weight.clone()
    merge(hidden, weight, source, target)
    return hidden[kept], weight[kept], columns[:, kept]


def naive(hidden: Tensor, weight: Tensor, source: Tensor, target: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """`compact` in fp64, one receiver at a time."""
    rows, weights = test_merge.naive(hidden, weight, source, target)
    return rows[kept], weights[kept]


def same(found, expected) -> None:
    """Asserts equality bit for bit, NaN included."""
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8))


@FORMS
@DTYPES
@SIZES
def test_survivors_become_the_weighted_means_of_their_members(form, dtype, close, width, pairs, receivers):
    *call, columns = case(width, dtype, pairs, receivers)
    hidden, weight, places = form(*call, columns)
    expected_hidden, expected_weight = naive(*call)
    torch.testing.assert_close(hidden.double(), expected_hidden, rtol=close, atol=close)
    torch.testing.assert_close(weight.double(), expected_weight, rtol=1e-6, atol=0)
    assert places.equal(columns[:, call[-1]])


@PAIRS
@DTYPES
@SIZES
def test_it_is_merging_and_gathering_bit_for_bit(form, merge, dtype, close, width, pairs, receivers):
    call = case(width, dtype, pairs, receivers)
    same(form(*call), in_two_steps(merge, *call))


def test_the_twin_is_that_in_fp64_too():
    call = case(dtype=torch.float64)
    same(compact_torch(*call), in_two_steps(merge_torch, *call))


@DTYPES
def test_the_kernel_equals_the_twin(dtype, close):
    call = case(dtype=dtype)
    hidden, *exact = compact_triton(*call)
    expected, *others = compact_torch(*call)
    torch.testing.assert_close(hidden, expected, rtol=close, atol=close)
    same(exact, others)


@FORMS
@DTYPES
def test_what_is_given_stays_as_it_is(form, dtype, close):
    call = case(dtype=dtype)
    before = [tensor.clone() for tensor in call]
    form(*call)
    same(call, before)


@FORMS
@DTYPES
def test_rows_that_nothing_merges_into_keep_their_bits(form, dtype, close):
    call = case(dtype=dtype)
    whole = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    call[0].view(whole)[-2:] = torch.iinfo(whole).max - torch.arange(2, dtype=whole)[:, None]  # two kinds of NaN
    call[1][-1] = torch.inf  # inf / inf would be NaN
    hidden, weight, _ = form(*call)
    alone = ~torch.isin(call[4], call[3])
    same((hidden[alone], weight[alone]), (call[0][call[4]][alone], call[1][call[4]][alone]))
    assert hidden[-2:].isnan().all()
    assert not hidden[~alone].isnan().any()


@FORMS
def test_members_without_any_weight_weigh_the_same(form):
    call = case()
    call[1][:] = 0
    call[1][call[3][-1]] = 2.0
    hidden, weight, _ = form(*call)
    torch.testing.assert_close(hidden.double(), naive(*call[:5])[0], rtol=1e-6, atol=1e-6)
    assert weight.equal(call[1][call[4]])


@FORMS
def test_sums_run_by_ascending_pair_wherever_the_pairs_of_a_survivor_stand(form):
    hidden, weight = torch.ones(6, 3), torch.tensor([1.0, 2.0**24, 1.0, 1.0, 5.0, 7.0])
    kept, none = torch.tensor([0, 4]), torch.zeros(0, 6, dtype=torch.int64)
    forward, backward = (
        form(hidden, weight, torch.tensor(source), torch.tensor([0, 4, 0, 0]), kept, none)[1][0]
        for source in ([1, 5, 2, 3], [3, 5, 2, 1])
    )
    assert forward == 2.0**24  # 1 + 2²⁴, rounded to even; then 1 and 1, each lost
    assert backward == 2.0**24 + 4  # 3 + 2²⁴, rounded to even


@FORMS
def test_all_that_comes_back_is_written(form, monkeypatch):
    """Memory is poisoned first, so an output element that is not written would show."""
    call = case()
    expected = form(*call)
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
    same(form(*call), expected)


def poisoned(make):
    def fill(*given, **options):
        made = make(*given, **options)
        return made.fill_(torch.nan if made.is_floating_point() else -7)

    return fill


@FORMS
def test_rows_that_lie_apart_in_memory_give_what_packed_rows_give(form):
    call = case(width=11)
    hidden, weight, source, target, kept, columns = call
    rows = torch.full((2 * ROWS, 33), torch.nan)[::2, ::3].copy_(hidden)
    integers = torch.zeros(6, 2 * ROWS, dtype=torch.int64)[::2, ::2].copy_(columns)
    spread = [torch.stack([tensor] * 2, dim=1)[:, 0] for tensor in (weight, source, target, kept)]
    same(form(rows, *spread, integers), form(*call))
    same(form(hidden, weight, source, target, kept, columns.T.contiguous().T), form(*call))


@pytest.mark.parametrize("far", ["rows", "columns"])
def test_the_kernel_reads_beyond_two_to_the_31_elements(far, tmp_path):
    """In a sparse file, of which only touched pages use disk space."""
    hidden, weight = torch.arange(81.0).view(9, 9).half(), torch.ones(9)
    pairs, kept = (torch.tensor([8, 0, 6]), torch.tensor([7, 7, 1])), torch.tensor([1, 2, 3, 4, 5, 7])
    columns = torch.arange(18).view(2, 9)
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=9 << 29, dtype=torch.float16)
    (tmp_path / "sparse").unlink()
    place = memory.as_strided((9, 9), (1 << 29, 1) if far == "rows" else (1, 1 << 29)).copy_(hidden)
    same(compact_triton(place, weight, *pairs, kept, columns), compact_torch(hidden, weight, *pairs, kept, columns))


@FORMS
def test_without_pairs_who_is_kept_is_gathered(form):
    hidden, weight, _, _, kept, columns = case()
    none = torch.zeros(0, dtype=torch.int64)
    same(form(hidden, weight, none, none, kept, columns), (hidden[kept], weight[kept], columns[:, kept]))
    found = form(hidden, weight, none, none, torch.arange(ROWS), columns)
    same(found, (hidden, weight, columns))
    assert {tensor.data_ptr() for tensor in found}.isdisjoint(tensor.data_ptr() for tensor in (hidden, weight, columns))


@FORMS
@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_is_left_of_nothing(form, rows):
    none, columns = torch.zeros(0, dtype=torch.int64), torch.zeros(2, rows, dtype=torch.int64)
    hidden, weight, places = form(torch.ones(rows, 5), torch.ones(rows), none, none, none, columns)
    assert (hidden.shape, weight.shape, places.shape) == ((0, 5), (0,), (2, 0))


@FORMS
@pytest.mark.parametrize("integers", [0, 1, 8, 9])
def test_any_number_of_integers_goes_along(form, integers):
    call = case(integers=integers)
    assert form(*call)[2].equal(call[5][:, call[4]])


@PAIRS
def test_one_survivor_may_take_all_others(form, merge):
    hidden, weight = torch.arange(float(ROWS))[:, None].repeat(1, 2), torch.ones(ROWS)
    source, kept = torch.arange(ROWS).roll(3)[:-1], torch.tensor([ROWS - 4])
    call = hidden, weight, source, torch.full_like(source, ROWS - 4), kept, torch.arange(ROWS)[None]
    assert [tensor.flatten().tolist() for tensor in form(*call)[1:]] == [[ROWS], [ROWS - 4]]
    torch.testing.assert_close(form(*call)[0], torch.full((1, 2), (ROWS - 1) / 2))
    same(form(*call), in_two_steps(merge, *call))


def test_the_twin_merges_the_same_in_slices_of_any_width(monkeypatch):
    call = case()
    expected = compact_torch(*call)
    monkeypatch.setattr("lightkv.ops.merge.FEATURES_AT_ONCE", 20)
    same(compact_torch(*call), expected)


@FORMS
def test_a_second_run_gives_the_same_bits(form):
    call = case()
    same(form(*call), form(*call))


@pytest.mark.parametrize("choice", ["torch", "triton"])
def test_the_operation_is_the_form_that_the_environment_asks_for(monkeypatch, choice):
    call, asked = case(), []
    module = operation if choice == "torch" else __import__("lightkv.ops.compact_kernel", fromlist=["compact_triton"])
    monkeypatch.setattr(module, f"compact_{choice}", lambda *given: asked.append(given) or "compacted")
    monkeypatch.setenv("LIGHTKV_OPS", choice)
    assert compact(*call) == "compacted"
    assert asked == [tuple(call)]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"hidden": torch.ones(3)}, "hidden must be"),
        ({"weight": torch.ones(2)}, r"weight must be fp32 \[3\]"),
        ({"source": torch.tensor([1], dtype=torch.int32)}, "source must be int64"),
        ({"target": torch.tensor([0, 0])}, "must have the same length, got 1 and 2"),
        ({"kept": torch.tensor([True, False, True])}, "kept must be int64 with one dimension, got torch.bool"),
        ({"kept": torch.tensor([[0, 2]])}, "kept must be int64 with one dimension"),
        ({"columns": torch.zeros(3, dtype=torch.int64)}, r"columns must be int64 \[C, 3\]"),
        (
            {"columns": torch.zeros(1, 2, dtype=torch.int64)},
            r"columns must be int64 \[C, 3\], got torch.int64 \[1, 2\]",
        ),
        ({"columns": torch.zeros(1, 3)}, r"columns must be int64 \[C, 3\], got torch.float32"),
    ],
)
def test_arguments_that_cannot_be_right_are_refused(wrong, words):
    right = {"hidden": torch.ones(3, 4), "weight": torch.ones(3), "source": torch.tensor([1])}
    right |= {"target": torch.tensor([0]), "kept": torch.tensor([0, 2]), "columns": torch.arange(3)[None]}
    compact(**right)
    with pytest.raises(ConfigError, match=words):
        compact(**right | wrong)


def test_the_kernel_compiles_for_gpus_with_64_bit_strides():
    signature = {"hidden": "*bf16", "weight": "*fp32", "columns": "*i64", "source": "*i64", "kept": "*i64"}
    signature |= {"stop": "*i64", "rows": "*bf16", "weights": "*fp32", "places": "*i64"}
    signature |= {f"stride_{name}": "i64" for name in ("s", "d", "w", "c", "p")}
    signature |= {"width": "i32", "count": "i32", "survivors": "i32", "BLOCK_D": "constexpr", "BLOCK_C": "constexpr"}
    sizes = {"BLOCK_D": BLOCK_D, "BLOCK_C": 8}
    assert compile_kernel("lightkv.ops.compact_kernel", "compact_kernel", signature, sizes, num_warps=2) == 0
