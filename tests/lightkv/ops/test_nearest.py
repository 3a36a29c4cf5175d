import math
from functools import wraps

import pytest
import torch
from torch import Tensor

from lightkv.errors import ConfigError
from lightkv.ops import nearest as operation
from lightkv.ops import nearest_kernel
from lightkv.ops.nearest_kernel import blocks
from lightkv.ops.ragged import Groups
from tests.lightkv.ops.offline import compile_kernel


def flat(form):
    """`form` with the fields of its groups as parameters, so that a case can change one of them."""

    @wraps(form)
    def call(hidden, scale, place, order, starts, middles, largest, distance):
        return form(hidden, scale, place, Groups(order, starts, middles, largest), distance)

    return call


nearest, nearest_torch = flat(operation.nearest), flat(operation.nearest_torch)
nearest_triton = flat(nearest_kernel.nearest_triton)
FORMS = pytest.mark.parametrize("form", [nearest_torch, nearest_triton])
WIDE = [(5, 7), (36, 37), (0, 3), (4, 0), (0, 0), (1, 1), (3, 33)]  # (A, B) of every group
SMALL = [(1, 1), (3, 2), (0, 2), (5, 5), (2, 0), (1, 4)]


def case(groups: list[tuple[int, int]], width: int, dtype: torch.dtype, seed: int = 0, whole: bool = False) -> dict:
    """Returns arguments by name, with more rows than the groups use; unused rows, row 0 included, are NaN.

    `whole`: integers without distance, so that all sums are exact and every form gives the same bits. (Square roots are
    not exact: PyTorch's last bit depends on the shape of the tensor.)
    """
    random = torch.Generator().manual_seed(seed)
    counts = torch.tensor(groups)
    used, starts = int(counts.sum()), torch.cat([torch.zeros(1, dtype=torch.int64), counts.sum(dim=1).cumsum(0)])
    rows = used + 5
    hidden = torch.randn(rows, width, generator=random)
    if whole:
        hidden = torch.randint(-1, 2, (rows, width), generator=random).float()
    order = 1 + torch.randperm(rows - 1, generator=random)[:used]
    scale = torch.full((rows,), 0.5) if whole else hidden.square().mean().mul(width).rsqrt().expand(rows).clone()
    place = torch.randint(0, 4, (rows, 3), generator=random) * torch.tensor([0.5, 1.0, 1.0])
    unused = torch.ones(rows, dtype=torch.bool).index_fill(0, order, False)
    hidden[unused], scale[unused], place[unused] = torch.nan, torch.nan, torch.nan
    return {
        "hidden": hidden.to(dtype),
        "scale": scale,
        "place": place,
        "order": order,
        "starts": starts,
        "middles": starts[:-1] + counts[:, 0],
        "largest": max(a for a, _ in groups),
        "distance": 0.0 if whole else 0.25,
    }


def naive(call: dict) -> list[tuple[int, float]]:
    """(closest, apart) by slot, in fp64, one pair at a time."""
    found = [(-1, math.inf)] * len(call["order"])
    starts, middles = call["starts"].tolist(), call["middles"].tolist()
    for first, middle, last in zip(starts[:-1], middles, starts[1:], strict=True):
        for slot in range(first, middle):
            for other in call["order"][middle:last].tolist():
                d = difference(call, int(call["order"][slot]), other)
                if d < found[slot][1]:
                    found[slot] = (other, d)
    return found


def difference(call: dict, a: int, b: int) -> float:
    x, y = (call["hidden"][row].double() * call["scale"][row].double() for row in (a, b))
    far = (call["place"][a].double() - call["place"][b].double()).square().sum().sqrt() if call["distance"] else 0.0
    return float((x - y).square().sum() / 2 + call["distance"] * far)


def same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@FORMS
@pytest.mark.parametrize("groups", [WIDE, SMALL])
@pytest.mark.parametrize(("dtype", "distance"), [(torch.float32, 0.25), (torch.bfloat16, 0.25), (torch.float16, 0.0)])
def test_the_nearest_b_is_the_one_that_a_loop_over_all_pairs_finds(form, groups, distance, dtype):
    call = case(groups, 70, dtype) | {"distance": distance}
    expected = naive(call)
    closest, apart = form(**call)
    assert closest.tolist() == [token for token, _ in expected]
    torch.testing.assert_close(apart, torch.tensor([d for _, d in expected]), rtol=1e-5, atol=2e-6)


@FORMS
def test_equal_differences_go_to_the_b_that_comes_first_in_order(form):
    call = case([(3, 150), (20, 40)], 9, torch.float32, whole=True)
    call["hidden"][call["order"][3:]] = call["hidden"][call["order"][3]].clone()  # the first B is of equal tokens
    closest, _ = form(**call)
    assert closest[:3].tolist() == [int(call["order"][3])] * 3
    assert closest.tolist() == [token for token, _ in naive(call)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("groups", "width"), [([(70, 131), (65, 3), (2, 2)], 5), (SMALL, 130), ([(20, 3)], 64)])
def test_the_kernel_equals_the_twin_bit_for_bit_where_sums_are_exact(groups, width, dtype):
    call = case(groups, width, dtype, whole=True)
    same(nearest_triton(**call), nearest_torch(**call))


@FORMS
def test_with_inverse_lengths_and_no_distance_it_is_one_minus_the_cosine(form):
    call = case([(6, 8)], 33, torch.float32) | {"distance": 0.0, "place": None}
    call["scale"] = call["hidden"].norm(dim=-1).reciprocal()
    a, b = (torch.nn.functional.normalize(call["hidden"][part], dim=-1) for part in call["order"].split([6, 8]))
    apart, which = (1 - a @ b.T).min(dim=-1)
    closest, found = form(**call)
    assert closest[:6].tolist() == call["order"][6:][which].tolist()
    torch.testing.assert_close(found[:6], apart, rtol=0, atol=1e-6)


@FORMS
def test_equal_tokens_in_equal_places_are_not_less_than_nothing_apart(form):
    call = case([(8, 8)], 40, torch.float32)
    a, b = call["order"].split(8)
    for values in (call["hidden"], call["place"]):
        values[b] = values[a]
    closest, apart = form(**call)
    assert closest[:8].tolist() == b.tolist()
    assert ((apart[:8] >= 0) & (apart[:8] < 1e-6)).all()


@FORMS
def test_rows_that_lie_apart_in_memory_give_what_packed_rows_give(form):
    call = case(WIDE, 12, torch.bfloat16)
    rows, width = call["hidden"].shape
    apart = torch.full((2 * rows, 3 * width), torch.nan, dtype=torch.bfloat16)[::2, ::3].copy_(call["hidden"])
    spread = {name: torch.stack([call[name]] * 2, dim=1)[:, 0] for name in ("scale", "place", "order", "middles")}
    same(form(**call | {"hidden": apart} | spread), form(**call))


@pytest.mark.parametrize("far", ["rows", "columns"])
def test_the_kernel_reads_beyond_two_to_the_31_elements(far, tmp_path):
    """In a sparse file, of which only touched pages use disk space."""
    call = case([(2, 2)], 9, torch.float16)
    expected = nearest_torch(**call)
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=9 << 29, dtype=torch.float16)
    (tmp_path / "sparse").unlink()
    assert call["hidden"].shape == (9, 9)
    place = memory.as_strided((9, 9), (1 << 29, 1) if far == "rows" else (1, 1 << 29))
    found = nearest_triton(**call | {"hidden": place.copy_(call["hidden"])})
    assert found[0].equal(expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=2e-6)


@FORMS
def test_a_batch_of_groups_is_so_many_batches_of_one(form):
    call = case(SMALL, 20, torch.bfloat16, whole=True)
    alone = []
    for first, middle, last in zip(call["starts"][:-1], call["middles"], call["starts"][1:], strict=True):
        starts, middles = torch.stack([first - first, last - first]), (middle - first)[None]
        alone.append(form(**call | {"order": call["order"][first:last], "starts": starts, "middles": middles}))
    same(form(**call), (torch.cat([c for c, _ in alone]), torch.cat([d for _, d in alone])))


@FORMS
def test_a_bound_above_the_largest_set_changes_nothing(form):
    call = case(SMALL, 20, torch.float16)
    same(form(**call | {"largest": 16}), form(**call))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy warns on inf − inf
@FORMS
def test_what_is_not_a_finite_difference_away_is_nobodys_nearest(form):
    call = case([(2, 3), (1, 1)], 6, torch.float32)
    order = call["order"].tolist()
    call["hidden"][[order[0], order[2], order[6]]] = torch.tensor([torch.nan, torch.nan, torch.inf])[:, None]
    closest, apart = form(**call)
    assert [closest[0], closest[5]] == [-1, -1]
    assert [apart[0], apart[5]] == [math.inf, math.inf]
    assert closest[1] in order[3:5]


@FORMS
@pytest.mark.parametrize("groups", [[], [(0, 0)], [(0, 4), (3, 0)]])
def test_without_pairs_nothing_is_near(form, groups):
    order = torch.arange(sum(a + b for a, b in groups))
    starts = torch.tensor([0, *(a + b for a, b in groups)]).cumsum(0)
    middles = starts[:-1] + torch.tensor([a for a, _ in groups], dtype=torch.int64)
    rows = max(1, len(order))
    closest, apart = form(torch.ones(rows, 4), torch.ones(rows), None, order, starts, middles, 3, 0.0)
    assert closest.dtype == torch.int64
    assert closest.tolist() == [-1] * len(order)
    assert apart.tolist() == [math.inf] * len(order)


def test_the_twin_finds_the_same_in_chunks_of_any_size(monkeypatch):
    call = case(WIDE, 10, torch.float32, whole=True)
    expected = nearest_torch(**call)
    monkeypatch.setattr(operation, "SCORES_AT_ONCE", 50)
    monkeypatch.setattr(operation, "FEATURES_AT_ONCE", 60)
    same(nearest_torch(**call), expected)


@FORMS
def test_a_second_run_gives_the_same_bits(form):
    call = case(WIDE, 40, torch.bfloat16)
    same(form(**call), form(**call))


@pytest.mark.parametrize(("choice", "form"), [("torch", "nearest_torch"), ("triton", "nearest_triton")])
def test_the_operation_is_the_form_that_the_environment_asks_for(monkeypatch, choice, form):
    call = case(SMALL, 8, torch.float32)
    asked = []
    module = operation if choice == "torch" else __import__("lightkv.ops.nearest_kernel", fromlist=[form])
    monkeypatch.setattr(module, form, lambda *given: asked.append(given) or "found")
    monkeypatch.setenv("LIGHTKV_OPS", choice)
    assert nearest(**call) == "found"
    [(hidden, scale, place, groups, distance)] = asked
    assert (hidden, scale, place, *vars(groups).values(), distance) == tuple(call.values())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"hidden": torch.ones(3, 4, 2)}, "hidden must be"),
        ({"hidden": torch.ones(3, 4, dtype=torch.int64)}, "hidden must be"),
        ({"scale": torch.ones(4)}, r"scale must be fp32 \[3\]"),
        ({"place": None}, "place must be given"),
        ({"place": torch.ones(3, 2)}, r"place must be fp32 \[3, 3\]"),
        ({"distance": -1.0}, "distance must be finite and at least 0"),
        ({"distance": math.nan}, "distance must be finite"),
        ({"order": torch.arange(3, dtype=torch.int32)}, "order must be int64"),
        ({"starts": torch.tensor([0])}, "one more than the 1 middles"),
        ({"largest": -1}, "largest must be at least 0"),
    ],
)
def test_arguments_that_cannot_be_right_are_refused(wrong, words):
    right = {"hidden": torch.ones(3, 4), "scale": torch.ones(3), "place": torch.ones(3, 3), "order": torch.arange(3)}
    right |= {"starts": torch.tensor([0, 3]), "middles": torch.tensor([1]), "largest": 1, "distance": 1.0}
    nearest(**right)
    with pytest.raises(ConfigError, match=words):
        nearest(**right | wrong)


@pytest.mark.parametrize(
    ("dtype", "most", "place"), [("bf16", 512, "*fp32"), ("bf16", 8, "constexpr"), ("fp32", 64, "constexpr")]
)
def test_the_kernel_compiles_for_gpus_with_64_bit_strides(dtype, most, place):
    options = blocks(most, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    signature = {"hidden": f"*{dtype}", "scale": "*fp32", "place": place, "order": "*i64", "starts": "*i64"}
    signature |= {"middles": "*i64", "closest": "*i64", "apart": "*fp32", "stride_s": "i64", "stride_d": "constexpr"}
    signature |= {"width": "i32", "tiles": "i32", "distance": "fp32"}
    constants = {"stride_d": 1} | ({"place": None} if place == "constexpr" else {})
    for name in ("BLOCK_A", "BLOCK_B", "BLOCK_D"):
        signature[name], constants[name] = "constexpr", options.pop(name)
    compile_kernel("lightkv.ops.nearest_kernel", "nearest_kernel", signature, constants, **options)
