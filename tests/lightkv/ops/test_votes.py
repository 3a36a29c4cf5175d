"""softmax_votes: the twin against loops in fp64 and against both scores of stages, the kernels against the twin."""

from functools import wraps
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightkv.errors import ConfigError
from lightkv.methods.guidance import QuestionGuidance
from lightkv.ops import votes, votes_kernel
from lightkv.ops.ragged import Selection, Sequences
from tests.lightkv import oracle
from tests.lightkv.ops.offline import compile_kernel
from tests.lightkv.strategies import generator, layouts


def flat(form):
    """`form` with the fields of both sides as parameters, so that a case can change one of them."""

    @wraps(form)
    def call(
        long, short, long_index, long_starts, short_index, short_starts, scale, reduce, longest_long, longest_short
    ):
        sides = (
            Selection(long, long_index, Sequences(long_starts, longest_long)),
            Selection(short, short_index, Sequences(short_starts, longest_short)),
        )
        return form(*sides, scale, reduce)

    return call


softmax_votes, softmax_votes_torch = flat(votes.softmax_votes), flat(votes.softmax_votes_torch)
softmax_votes_triton = flat(votes_kernel.softmax_votes_triton)

TOLERANCE = {"atol": 2e-6, "rtol": 2e-5}  # for every dtype: arithmetic is fp32
SIZES = [(17, 5), (0, 3), (40, 17), (4, 0), (1, 1)]  # (long, short) tokens per sequence


def starts(sizes):
    return torch.tensor([0, *accumulate(sizes)])


def case(heads=(4, 2), sizes=SIZES, d=5, dtype=torch.float32, reduce="sum", seed=0, batch=2):
    """Returns arguments for sequences of these sizes; their tokens are at random places of a batch."""
    random, (longest_long, longest_short) = generator(seed), map(max, zip(*sizes, strict=True))
    arguments = {"scale": 0.7, "reduce": reduce, "longest_long": longest_long, "longest_short": longest_short}
    for side, number, counts in zip(("long", "short"), heads, zip(*sizes, strict=True), strict=True):
        tokens = sum(counts) // batch + 3
        arguments[side] = torch.randn(batch, number, tokens, d, generator=random).to(dtype)
        arguments[f"{side}_index"] = torch.randperm(batch * tokens, generator=random)[: sum(counts)]
        arguments[f"{side}_starts"] = starts(counts)
    return arguments


def packed(x, index):
    """The tokens at `index`, [N, H, d] in fp64."""
    return x.double().transpose(1, 2).flatten(0, 1)[index]


def loops(long, short, long_index, long_starts, short_index, short_starts, scale, reduce, longest_long, longest_short):
    rows, columns = packed(long, long_index), packed(short, short_index)
    out, heads = torch.zeros(len(rows), dtype=torch.float64), max(rows.shape[1], columns.shape[1])
    for r in range(len(long_starts) - 1):
        mine = slice(long_starts[r], long_starts[r + 1])
        for column in columns[short_starts[r] : short_starts[r + 1]]:
            for head in range(heads):
                one, other = rows[mine, head * rows.shape[1] // heads], column[head * columns.shape[1] // heads]
                vote = torch.softmax(one @ other * scale, dim=0)
                out[mine] = out[mine] + vote if reduce == "sum" else torch.maximum(out[mine], vote)
    return out.float()


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles and chunks even for few tokens."""
    monkeypatch.setattr(votes_kernel, "MOST_ROWS", {2: 16, 4: 16})
    monkeypatch.setattr(votes_kernel, "CHUNK", 32)


@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (4, 2), (6, 1), (2, 6)])
@pytest.mark.parametrize("at_once", [1, 1 << 24])
def test_twin_is_what_the_loops_say(heads, reduce, at_once, monkeypatch):
    monkeypatch.setattr(votes, "SCORES_AT_ONCE", at_once)
    arguments = case(heads, reduce=reduce)
    torch.testing.assert_close(softmax_votes_torch(**arguments), loops(**arguments), atol=1e-6, rtol=1e-6)


def test_twin_holds_a_bounded_block_of_scores(monkeypatch):
    arguments, sizes, softmax = case((2, 6)), [], torch.softmax
    monkeypatch.setattr(votes, "SCORES_AT_ONCE", 40 * 7)
    monkeypatch.setattr(torch, "softmax", lambda x, dim: sizes.append(x.numel()) or softmax(x, dim))
    softmax_votes_torch(**arguments)
    assert max(sizes) == 40 * 7


def batch_of(rows, heads, seed):
    """Returns q and k of left-padded rows, and each row's token indices in the flattened batch."""
    length = max(len(row) for row in rows)
    q = torch.randn(len(rows), heads[0], length, 4, generator=generator(seed))
    k = torch.randn(len(rows), heads[1], length, 4, generator=generator(seed + 1))
    return q, k, [torch.arange((r + 1) * length - len(row), (r + 1) * length) for r, row in enumerate(rows)]


def chosen(places, masks):
    """index, starts and the most for the tokens that each row's mask names."""
    index = [place[mask] for place, mask in zip(places, masks, strict=True)]
    sizes = [len(part) for part in index]
    return torch.cat(index), starts(sizes), max(sizes)


def both_scores(operation, rows, heads, seed):
    """Yields (result, expected) for prompt guidance and question attention; expected is from loops over each row."""
    q, k, places = batch_of(rows, heads, seed)
    pads = [q.shape[2] - len(row) for row in rows]
    pairs = [
        (q[r, :, pad:].tolist(), k[r, :, pad:].tolist(), row)
        for r, (pad, row) in enumerate(zip(pads, rows, strict=True))
    ]
    everyone = chosen(places, [torch.ones(len(row), dtype=torch.bool) for row in rows])
    text, vision = chosen(places, [row.is_text for row in rows]), chosen(places, [row.is_vision for row in rows])
    asking = chosen(places, [QuestionGuidance().voters(row) for row in rows])
    got = operation(q, k, *everyone[:2], *text[:2], 0.4, "sum", everyone[2], text[2])
    yield got, torch.cat([torch.tensor(oracle.guidance(q, k, row.is_text.tolist(), 0.4)) for q, k, row in pairs])
    got = operation(k, q, *vision[:2], *asking[:2], 0.4, "max", vision[2], asking[2])
    most = [torch.tensor(oracle.asked(q, k, row.item.tolist(), 0.4)) for q, k, row in pairs]
    yield got, torch.cat([score[row.is_vision] for score, row in zip(most, rows, strict=True)])


@settings(max_examples=15, deadline=None)
@given(
    rows=st.lists(layouts(), min_size=1, max_size=3).filter(lambda rows: any(len(row) for row in rows)),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    seed=st.integers(0, 10**6),
)
def test_twin_gives_prompt_guidance_and_the_questions_attention(rows, heads, seed):
    for got, expected in both_scores(softmax_votes_torch, rows, heads, seed):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


@settings(max_examples=4, deadline=None)
@given(
    rows=st.lists(layouts(), min_size=1, max_size=3).filter(lambda rows: any(len(row) for row in rows)),
    heads=st.sampled_from([(4, 2), (3, 1)]),
    seed=st.integers(0, 10**6),
)
def test_kernel_gives_prompt_guidance_and_the_questions_attention(rows, heads, seed):
    for got, expected in both_scores(softmax_votes_triton, rows, heads, seed):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("heads", "d", "dtype", "reduce"),
    [
        ((1, 1), 1, torch.float32, "sum"),
        ((2, 1), 16, torch.bfloat16, "sum"),
        ((3, 3), 40, torch.float16, "max"),
        ((1, 1), 3, torch.float64, "max"),
        ((2, 6), 20, torch.float32, "max"),
        ((1, 3), 9, torch.bfloat16, "sum"),
    ],
)
def test_kernel_equals_twin(heads, d, dtype, reduce):
    """Ragged sequences, some empty on either side, in several tiles and chunks."""
    arguments = case(heads, d=d, dtype=dtype, reduce=reduce)
    torch.testing.assert_close(softmax_votes_triton(**arguments), softmax_votes_torch(**arguments), **TOLERANCE)


def test_kernel_equals_twin_in_tiles_of_full_size():
    arguments = case((1, 2), [(1100, 70), (129, 1)], d=128, dtype=torch.bfloat16, reduce="max")
    torch.testing.assert_close(softmax_votes_triton(**arguments), softmax_votes_torch(**arguments), atol=0, rtol=1e-4)


def strided(layout, x):
    """The values of x [B, H, S, d] in another memory layout."""
    if layout == "tokens first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "part of a projection":
        return torch.cat([x, x], dim=1).transpose(1, 2).contiguous()[:, :, : x.shape[1]].transpose(1, 2)
    if layout == "longer rows":
        return torch.cat([x, torch.full_like(x, torch.nan)], dim=2)[:, :, : x.shape[2]]
    return x.transpose(2, 3).contiguous().transpose(2, 3)


@pytest.mark.parametrize("layout", ["tokens first", "part of a projection", "longer rows", "last dimension apart"])
def test_kernel_takes_any_strides(layout):
    arguments = case((2, 4), SIZES[:2])
    expected = softmax_votes_torch(**arguments)
    for side in ("long", "short"):
        arguments[side] = strided(layout, arguments[side])
    torch.testing.assert_close(softmax_votes_triton(**arguments), expected, **TOLERANCE)


def test_kernel_takes_a_repeated_batch():
    arguments = case((2, 2), SIZES[:1])
    for side in ("long", "short"):
        arguments[side] = arguments[side][:1].expand(2, -1, -1, -1)
    expected = softmax_votes_torch(**arguments)
    torch.testing.assert_close(softmax_votes_triton(**arguments), expected, **TOLERANCE)


@pytest.mark.parametrize("far", ["heads", "tokens"])
def test_kernel_reads_beyond_two_to_the_31_elements(far, tmp_path):
    """In a sparse file, of which only touched pages use disk space."""
    arguments = case((6, 1), [(3, 2)], d=4, dtype=torch.float16, batch=1)
    expected, apart, file = softmax_votes_torch(**arguments), 1 << 29, tmp_path / "sparse"
    memory = torch.from_file(str(file), shared=True, size=6 * apart, dtype=torch.float16)
    file.unlink()
    assert arguments["long"].shape == (1, 6, 6, 4)
    place = memory.as_strided((1, 6, 6, 4), (0, apart, 4, 1) if far == "heads" else (0, 4, apart, 1))
    arguments["long"] = place.copy_(arguments["long"])
    torch.testing.assert_close(softmax_votes_triton(**arguments), expected, **TOLERANCE)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_kernel_reads_nothing_but_its_tokens_and_writes_all_its_memory(reduce, monkeypatch):
    arguments = case((2, 4), reduce=reduce)
    expected = softmax_votes_torch(**arguments)
    for side in ("long", "short"):
        named = torch.zeros(arguments[side].shape[0] * arguments[side].shape[2], dtype=torch.bool)
        named[arguments[f"{side}_index"]] = True
        others = ~named.view(arguments[side].shape[0], 1, -1, 1)
        arguments[side] = arguments[side].masked_fill(others, torch.nan)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **kw: empty(*shape, **kw).fill_(torch.nan))
    torch.testing.assert_close(softmax_votes_triton(**arguments), expected, **TOLERANCE)


@pytest.mark.parametrize("operation", [softmax_votes_torch, softmax_votes_triton])
def test_a_batch_is_what_its_sequences_are_alone(operation):
    arguments = case((2, 4), reduce="max")
    whole = operation(**arguments)
    for r, (long, short) in enumerate(SIZES):
        alone = dict(arguments, longest_long=long, longest_short=short)
        for side, size in (("long", long), ("short", short)):
            begin = arguments[f"{side}_starts"][r]
            alone[f"{side}_index"] = arguments[f"{side}_index"][begin : begin + size]
            alone[f"{side}_starts"] = starts([size])
        mine = slice(arguments["long_starts"][r], arguments["long_starts"][r + 1])
        torch.testing.assert_close(operation(**alone), whole[mine], atol=1e-6, rtol=1e-5)


def test_kernel_says_the_same_twice():
    arguments = case((2, 4), [(50, 20), (9, 4)])
    assert torch.equal(softmax_votes_triton(**arguments), softmax_votes_triton(**arguments))


@pytest.mark.parametrize("operation", [softmax_votes_torch, softmax_votes_triton])
def test_each_short_token_hands_out_one_vote_per_head(operation):
    arguments = case((2, 6), [(50, 7), (20, 3)], d=8)
    given_out = [part.sum().item() for part in operation(**arguments).split([50, 20])]
    assert given_out == pytest.approx([6 * 7, 6 * 3], rel=1e-5)


@pytest.mark.parametrize("operation", [softmax_votes_torch, softmax_votes_triton])
@pytest.mark.parametrize("sizes", [[(0, 0)], [(0, 4), (0, 0)], [(5, 0), (3, 0)]])
def test_without_either_side_there_are_no_votes(operation, sizes):
    assert operation(**case(sizes=sizes)).tolist() == [0.0] * sum(long for long, _ in sizes)


@pytest.mark.parametrize("operation", [softmax_votes_torch, softmax_votes_triton])
def test_half_precision_scores_do_not_overflow(operation):
    arguments = dict(case((1, 1), [(4, 2)], d=64, dtype=torch.float16, batch=1), scale=1.0)
    for side in ("long", "short"):
        arguments[side] = torch.full_like(arguments[side], 60.0)
    torch.testing.assert_close(operation(**arguments), torch.full((4,), 0.5))


@pytest.mark.parametrize("operation", [softmax_votes_torch, softmax_votes_triton])
@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_votes_carry_no_gradient(operation, reduce):
    arguments = case((1, 1), [(4, 2)], reduce=reduce)
    for side in ("long", "short"):
        arguments[side].requires_grad_()
    assert not operation(**arguments).requires_grad


class Unlaunched:
    """Replaces a kernel: records launches and does nothing."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.launches.append(grid)


def test_launcher_does_not_wait_for_the_device(monkeypatch):
    """Tensors on the meta device have no values to wait for."""
    unlaunched = Unlaunched()
    monkeypatch.setattr(votes_kernel, "peaks_kernel", unlaunched)
    monkeypatch.setattr(votes_kernel, "votes_kernel", unlaunched)
    arguments = case((4, 2), [(1100, 30), (600, 5)], d=128, dtype=torch.bfloat16)
    moved = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    assert softmax_votes_triton(**moved).shape == (1700,)
    assert unlaunched.launches == [(2 * 3, 4), (2 * 9, 4)]


@pytest.mark.parametrize("choice", ["torch", "triton"])
def test_the_environment_chooses(choice, monkeypatch):
    arguments, called = case(sizes=[(5, 2)]), []
    monkeypatch.setattr("lightkv.ops.votes.softmax_votes_torch", lambda *_: called.append("torch"))
    monkeypatch.setattr("lightkv.ops.votes_kernel.softmax_votes_triton", lambda *_: called.append("triton"))
    monkeypatch.setenv("LIGHTKV_OPS", choice)
    softmax_votes(**arguments)
    assert called == [choice]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"reduce": "mean"}, "reduce must be one of"),
        ({"short": torch.zeros(2, 2, 20, 6)}, r"same d on both sides, got \[2, 4, 34, 5\] and \[2, 2, 20, 6\]"),
        ({"short": torch.zeros(2, 3, 20, 5)}, r"must divide the other, got \[3, 4\]"),
        ({"short": torch.zeros(2, 2, 20, 5, dtype=torch.float16)}, "both sides must have one of"),
        ({"long_index": torch.zeros(62, dtype=torch.int32)}, "long.index must be int64"),
        ({"short_starts": torch.zeros(1, 6, dtype=torch.int64)}, "short.sequences.starts must be int64"),
        ({"long_starts": torch.tensor([0, 62])}, "got 2 and 6"),
        ({"longest_long": 39}, "long.sequences.longest must be at least the longest sequence, 40, got 39"),
        ({"longest_short": 3}, "short.sequences.longest must be at least the longest sequence, 17, got 3"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, says):
    with pytest.raises(ConfigError, match=says):
        softmax_votes(**case() | change)


SIDES = {"long": "*bf16", "short": "*bf16"} | dict.fromkeys(
    ["long_rows", "long_starts", "short_rows", "short_starts"], "*i64"
)
STRIDES = dict.fromkeys(["long_stride_head", "long_stride", "short_stride_head", "short_stride"], "i64")
CONSTANTS = {"D": 40, "GROUP": 7, "SHARED": 1, "BLOCK_D": 64}


def signature(dtype, results, numbers, constants):
    sides = SIDES | {"long": dtype, "short": dtype}
    floats, integers = dict.fromkeys(results, "*fp32"), dict.fromkeys(numbers, "i32")
    return (
        sides | floats | STRIDES | {"scale": "fp32", "width": "i64"} | integers | dict.fromkeys(constants, "constexpr")
    )


def test_first_pass_compiles():
    constants = CONSTANTS | {"CHUNK": 512, "BLOCK_M": 64, "BLOCK_N": 64}
    types = signature("*bf16", ["peaks", "totals"], ["chunks", "short_tiles"], constants)
    compile_kernel("lightkv.ops.votes_kernel", "peaks_kernel", types, constants, num_warps=4, num_stages=3)


@pytest.mark.parametrize(("maximum", "dtype", "rows"), [(True, "*bf16", 64), (False, "*fp32", 16)])
def test_second_pass_compiles(maximum, dtype, rows):
    constants = CONSTANTS | {"MAXIMUM": maximum, "BLOCK_M": rows, "BLOCK_N": rows}
    types = signature(dtype, ["peak", "share", "votes"], ["length", "long_tiles"], constants)
    compile_kernel("lightkv.ops.votes_kernel", "votes_kernel", types, constants, num_warps=4, num_stages=2)
