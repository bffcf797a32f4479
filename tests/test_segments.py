"""Segments, halves and paths of the fused layer: how a sequence is cut, and which of two arithmetics a program takes.

A sequence longer than `launch.SEGMENT` is cut into segments, whose states are found and combined first, or, if there
are `launch.MANY` of them, into halves, in which two programs walk towards each other. A program computes by the fast
path, and again by the path for every gate if it met an exponent below `launch.BOUND`. No choice may show in the result.
Tests shrink the segments, so that a few chunks make several, choose between segments and halves, and move the bound,
so that one path alone is at work. Both paths and every cut must agree with the naive layer: bitwise on dyadic inputs,
elsewhere within the bound of `vig_ref.tolerance`.

What is not seen here: the compiler, races, and the arithmetic of bfloat16, which only a GPU has.
"""

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import interpreter_builder

from cases import CHUNK, FUSED_ARITHMETIC, FUSED_DEVICE, LAYERS, device_of, every_second, interpreted
from test_exact import HALF, dyadic, equal_bits
from test_layers import check
from vig_ref import bidirectional_gla, fused, gla, naive
from vig_ref.fused import kernels, launch
from vig_ref.tolerance import NAMES, Inputs, draw, evaluate, reference

C = fused.CHUNK
INF = float("inf")
#: Natural log gates in base 2, the unit of the bounds.
LOG2 = float(-HALF)


@pytest.fixture(params=[False, True], ids=["segments", "halves"])
def halves(request, monkeypatch):
    """Whether long sequences are halved or cut into segments, however many there are."""
    monkeypatch.setattr(launch, "MANY", 1 if request.param else 10**9)
    return request.param


@pytest.fixture
def segments_of(monkeypatch, halves):
    return lambda tokens: monkeypatch.setattr(launch, "SEGMENT", tokens)


@pytest.fixture
def keep(monkeypatch):
    """Keeps what the launcher's functions of these names allocate from now on: a list that grows."""
    kept = []

    def keep(*names: str) -> list[torch.Tensor]:
        for name in names:
            allocate = getattr(launch, name)
            monkeypatch.setattr(launch, name, lambda *arguments, of=allocate: kept.append(of(*arguments)) or kept[-1])
        return kept

    return keep


def set_bounds(monkeypatch, bound: float):
    monkeypatch.setattr(launch, "BOUND", bound)
    monkeypatch.setattr(launch, "BOUND_BACKWARD", dict.fromkeys(launch.BOUND_BACKWARD, bound))


def number(argument) -> int:
    """What a kernel's function was called with, in the interpreter."""
    return int(np.asarray(getattr(getattr(argument, "handle", None), "data", argument)).item())


@pytest.fixture
def recomputed(monkeypatch):
    """The token ranges that programs computed by the path for every gate: (pass, first token, end)."""
    calls = []

    def recorded(which: str, name: str):
        function = getattr(kernels, name)
        where = [function.arg_names.index(argument) for argument in ("first", "count", "step")]

        def call(*arguments):
            first, count, step = (number(arguments[n]) for n in where)
            start = min(first, first + (count - 1) * step)
            calls.append((which, start * C, (start + count) * C))
            return function(*arguments)

        monkeypatch.setattr(kernels, name, call)

    recorded("forward", "forward_halving")
    recorded("backward", "states_halving")
    recorded("backward", "gradients_halving")
    return calls


#: Bounds with which every program takes one path.
PATHS = {"fast path alone": -1e4, "path for every gate alone": 1.0}


def one_head(x: Inputs) -> Inputs:
    return Inputs(*(t[:, :1] for t in x))


def gentle(T: int, K: int, V: int, seed: int) -> Inputs:
    """Dyadic inputs with at most 8 halvings of a row, anywhere, and no resets: exact on the fast path, too."""
    r = torch.Generator().manual_seed(seed)

    def gates():
        n = torch.randint(1, 3, (1, 1, T, K), generator=r) * (torch.rand(1, 1, T, K, generator=r) < 5 / T)
        return torch.where(n.cumsum(2) <= 8, n, 0) * HALF

    return one_head(dyadic(T, K, V, seed))._replace(g_fwd=gates(), g_rev=gates())


def on_device(*sizes: int, **options) -> Inputs:
    return draw(*sizes, device=FUSED_DEVICE, **options)


def judge(x: Inputs, **options):
    check(fused.bidirectional_gla, x, scale=0.5, chunk=CHUNK["fused"], **options)


def same_bits(x: Inputs):
    """Not with a scale of 2, which is 1 within a kernel."""
    equal_bits(fused, x, evaluate(naive.bidirectional_gla, x, scale=-1.0), -1.0)


# --- segments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "T", "inputs"), [(32, 40, dyadic), (32, 65, gentle), (64, 65, gentle)])
def test_segments_of_any_length_are_bitwise_equal_on_dyadic_inputs(segments_of, tokens, T, inputs):
    segments_of(tokens)
    same_bits(one_head(inputs(T, 3, 4, seed=0)))


@pytest.mark.parametrize("T", [31, 32, 33, 64])
def test_lengths_at_the_edge_of_a_segment(segments_of, T):
    segments_of(32)
    same_bits(gentle(T, 3, 4, seed=T))


@pytest.mark.parametrize(("regime", "T"), [("moderate", 33), ("strong", 33), ("reset", 65)])
def test_segments_equal_the_oracle(segments_of, regime, T):
    segments_of(32)
    judge(on_device(1, 1, T, 5, 7, regime=regime))


@pytest.mark.skipif(not launch.INTERPRETED, reason="the compiled layer takes no float64")
def test_segments_in_float64(segments_of):
    """To 1e-12 of the gauge: tests/test_exact.py has that this is what the bound says."""
    segments_of(32)
    judge(on_device(1, 1, 33, 3, 4, dtype=torch.float64))


@pytest.mark.parametrize("reverse", [False, True])
def test_segments_of_one_direction(segments_of, reverse):
    segments_of(32)
    x = gentle(65, 3, 4, seed=int(reverse))

    def one_direction(layer):
        device = FUSED_DEVICE if layer == "fused" else "cpu"
        leaves = [t.to(device, copy=True).requires_grad_() for t in (*x[:3], x[3 + reverse])]
        o = gla(*leaves, reverse=reverse, scale=-0.5, backend=layer)
        return [t.cpu() for t in (o, *torch.autograd.grad(o, leaves, x.do.to(o.device)))]

    assert all(map(torch.equal, one_direction("fused"), one_direction("naive")))


def test_segments_of_several_blocks_of_v(segments_of):
    """K above 32: the tile has few rows, so that V is cut, and every block of it has states of its own.

    No stride is 1: a block of V starts 32 strides behind the one before.
    """
    segments_of(32)
    same_bits(Inputs(*map(every_second, gentle(33, 40, 35, seed=0))))


def weak(x: Inputs) -> Inputs:
    """With gates so weak that a state lives through all segments, and another one in every head of every image."""
    B, H = x.q.shape[:2]
    pace = torch.arange(1, B * H + 1, device=x.q.device, dtype=x.g_fwd.dtype).view(B, H, 1, 1)
    return x._replace(g_fwd=(-0.002 * pace).expand_as(x.g_fwd), g_rev=(-0.003 * pace).expand_as(x.g_rev))


@pytest.mark.parametrize("how", FUSED_ARITHMETIC[1:], ids=str)
@pytest.mark.parametrize(("B", "K", "V"), [(2, 3, 4), (1, 40, 35)])
def test_segments_of_several_images_heads_and_blocks_of_v(segments_of, B, K, V, how):
    """Three segments of which the last is short. In float64 here: what is lost in 1e-10 of it is seen, too."""
    segments_of(32)
    judge(weak(on_device(B, 2, 66, K, V, dtype=how.dtype)), dot=how.dot, **how.options)


def test_longer_segments_where_there_would_be_too_many(monkeypatch, segments_of):
    segments_of(32)
    monkeypatch.setattr(launch, "MAX_SEGMENTS", 2)
    assert launch._segment(200) == 112
    judge(weak(on_device(1, 2, 200, 3, 4)))


@pytest.mark.parametrize("regime", ["vig", "strong", "reset"])
@pytest.mark.parametrize("gates", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("K", "V"), [(16, 32), (32, 64)])
def test_few_programs_compute_the_same_bits_as_many(segments_of, monkeypatch, K, V, gates, regime):
    """With the heads of ViG-H halves of few sequences prepare a chunk early; and the last chunk is not full."""
    segments_of(32)
    x = on_device(1, 1, 53, K, V, regime=regime, dtype=torch.bfloat16, gate_dtype=gates)
    results = []
    for few in (True, False):
        monkeypatch.setattr(launch, "_few", lambda grid, few=few: few)
        results.append(evaluate(fused.bidirectional_gla, x, scale=0.5))
    assert all(torch.equal(results[0][name], results[1][name]) for name in NAMES)
    judge(x, dot="bfloat16")


def test_more_segments_than_are_on_their_way_at_once(monkeypatch):
    """Seventy: several rounds of `combine_kernel`, and a rest."""
    monkeypatch.setattr(launch, "SEGMENT", C)
    monkeypatch.setattr(launch, "MANY", 10**9)
    judge(weak(on_device(1, 1, 70 * C, 3, 4)))


@pytest.mark.parametrize("tile", launch.TILES)
def test_combine_kernel_goes_through_all_cells(tile):
    assert tile[0] * tile[1] % launch.kernels.CELLS.value == 0


def test_segments_of_a_neighbour_do_not_matter(segments_of):
    """Bitwise the same alone and in a batch that is cut alike; each sequence of each head has states of its own."""
    segments_of(32)
    x = on_device(2, 2, 33, 3, 4)[:5]
    whole, alone = (bidirectional_gla(*tensors, backend="fused") for tensors in (x, [t[1:, 1:] for t in x]))
    assert torch.equal(whole[1:, 1:], alone)


def test_long_sequences_are_halved_where_there_are_many():
    """One for each batch, head and block of V; and only with two gates, of one dtype."""
    g, T = torch.empty(1, device="meta"), launch.SEGMENT + 1

    def halved(B, H, T, K, V, g_fwd=g, g_rev=g):
        q, v = (torch.empty(B, H, T, D, device="meta") for D in (K, V))
        return launch._cut(q, v, g_fwd, g_rev).halves

    enough = launch.MANY // 4
    assert halved(enough, 4, T, 32, 64)
    assert halved(4, enough, T, 16, 32)
    assert halved(enough, 2, T, 128, 33)
    assert not halved(enough - 1, 4, T, 32, 64)
    assert not halved(enough, 4, launch.SEGMENT, 32, 64)
    assert not halved(enough, 4, T, 32, 64, g_rev=None)
    assert not halved(enough, 4, T, 32, 64, g_fwd=None)
    assert not halved(enough, 4, T, 32, 64, g_rev=g.bfloat16())


@pytest.mark.parametrize(
    ("sequences", "blocks", "places", "half"),
    [(128, 1, 264, 512), (132, 1, 264, 512), (133, 1, 264, 688), (176, 1, 264, 688), (192, 1, 264, 768),
     (96, 2, 264, 768), (198, 1, 264, 768), (199, 1, 264, 832), (211, 1, 264, 832), (212, 1, 264, 512),
     (264, 1, 264, 512), (1000, 1, 264, 512), (192, 1, 528, 512)],
)  # fmt: skip
def test_backward_halves_end_together(sequences, blocks, places, half):
    """All fit at once up to 132; the short ones follow each other in two rounds up to 176, 3 up to 198, 4 up to 211."""
    even = launch.Cut(True, (32, 64), (sequences, blocks, 2), (3, 1024, 32, 64, 512))
    assert launch._meet_backward(even, places) == even._replace(sizes=(3, 1024, 32, 64, half))


@interpreted
def test_an_h200_has_places_for_two_programs_of_four_warps_a_multiprocessor():
    assert launch._at_once(torch.empty(0), 4) == 264


@pytest.fixture
def uneven(monkeypatch):
    """Halves sequences of more than 32 tokens; so many programs, of four or eight warps, then run at once."""

    def set_places(places: int):
        monkeypatch.setattr(launch, "SEGMENT", 32)
        monkeypatch.setattr(launch, "MANY", 1)
        monkeypatch.setattr(launch, "_at_once", lambda _, warps: {4: places, 8: places}[warps])

    return set_places


@pytest.mark.parametrize("sizes", [(1, 3, 115, 5, 7), (1, 1, 115, 3, 65)], ids=["heads", "blocks of V"])
@pytest.mark.parametrize("bound", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("places", [4, 5])
def test_uneven_halves_equal_the_oracle(monkeypatch, uneven, places, bound, sizes):
    set_bounds(monkeypatch, bound)
    uneven(places)
    judge(on_device(*sizes))


@interpreted
@pytest.mark.parametrize(("places", "half"), [(4, 96), (5, 80), (6, 64)])
def test_long_halves_come_first(monkeypatch, uneven, places, half):
    """In both walks of the backward pass, in a GPU's order: the last index of a program changes last."""
    uneven(places)
    walks = []
    chunks = kernels._chunks

    def recorded(i_s, T, SEGMENT):
        walks.append((interpreter_builder.grid_idx[::-1], number(i_s), number(SEGMENT)))
        return chunks(i_s, T, SEGMENT)

    x = [t.requires_grad_() for t in on_device(1, 3, 115, 5, 7)[:5]]
    o = bidirectional_gla(*x, backend="fused")
    monkeypatch.setattr(kernels, "_chunks", recorded)
    o.sum().backward()
    assert len(walks) == 12
    for walk in (walks[:6], walks[6:]):
        assert [numbers for _, *numbers in sorted(walk)] == 3 * [[0, half]] + 3 * [[1, half]]


@pytest.mark.parametrize("end", ["g_fwd", "g_rev"])
def test_halves_of_gates_that_lie_differently(segments_of, end):
    """A program chooses its gate as it runs: strides of one of them are not those of the other."""
    segments_of(32)
    x = gentle(50, 5, 7, seed=0)
    same_bits(x._replace(**{end: every_second(getattr(x, end))}))


def test_gates_of_two_dtypes_are_cut_into_segments(monkeypatch):
    """However many there are: then with the same bits as with both gates in float32."""
    monkeypatch.setattr(launch, "SEGMENT", 32)
    monkeypatch.setattr(launch, "MANY", 1)
    q, k, v, g_fwd, g_rev = on_device(1, 1, 49, 3, 4, dtype=torch.float16)[:5]
    got = bidirectional_gla(q, k, v, g_fwd, g_rev.float(), backend="fused")
    monkeypatch.setattr(launch, "MANY", 10**9)
    assert torch.equal(got, bidirectional_gla(q, k, v, g_fwd.float(), g_rev.float(), backend="fused"))


@interpreted
def test_states_in_between_are_as_precise_as_sums(segments_of):
    """In float16 a result is that of the same numbers in float32, rounded: nothing in between was."""
    segments_of(32)
    x = [t.half() for t in on_device(1, 1, 49, 3, 4)[:5]]
    wide = bidirectional_gla(*(t.float() for t in x), backend="fused")
    assert torch.equal(bidirectional_gla(*x, backend="fused"), wide.half())


def test_a_sequence_is_cut_into_few_segments():
    """Whole chunks, no segment without tokens, no more of them than need be, and none longer."""
    for T in (*range(1, 70_000), 100_000, 5_000_000, 2**31 - 1):
        tokens, segments = launch._segment(T), launch._segments(T)
        assert tokens % C == 0, T
        assert (segments - 1) * tokens < T <= segments * tokens, T
        wanted = min(-(-T // launch.SEGMENT), launch.MAX_SEGMENTS)
        assert segments <= wanted, T
        assert tokens < T / wanted + C, T


def test_programs_are_few_up_to_four_for_each_multiprocessor():
    assert launch._few((launch.MANY, 2, 2))
    assert not launch._few((launch.MANY, 5, 1))


class Operator(torch.nn.Module):
    """For torch.export, which takes modules."""

    def forward(self, *inputs):
        return launch._forward(*inputs, 0.5, "ieee")


@pytest.mark.parametrize(("least", "most"), [(2, 256), (17, 256), (257, 65_536), (1024, 4096)])
def test_any_number_of_tokens_can_be_exported(least, most):
    """What torch.export must assume of T to know how many segments there are is where they begin, and no more."""
    x = on_device(1, 1, most, 3, 4)[:5]
    T = torch.export.Dim("T", min=least, max=most)
    torch.export.export(Operator(), x, dynamic_shapes=(({2: T},) * 5,), strict=False)


def test_of_one_piece_any_sizes_can_be_exported():
    """Which tile they take is asked when the operator runs: no model is compiled anew for it."""
    K, V = (torch.export.Dim(name, min=2, max=128) for name in ("K", "V"))
    shapes = ({3: K}, {3: K}, {3: V}, {3: K}, {3: K})
    torch.export.export(Operator(), on_device(1, 1, 20, 3, 4)[:5], dynamic_shapes=(shapes,), strict=False)


def test_every_chunk_leaves_its_share_of_o_in_a_place_of_its_own(keep, segments_of, halves):
    """On a GPU programs run at the same time; here, one after the other, two could share a place unnoticed."""
    segments_of(32)
    kept = keep("_share")
    x = Inputs(*(t.to(FUSED_DEVICE, torch.float32) for t in gentle(70, 5, 7, seed=0)))
    bidirectional_gla(*x[:5], scale=0.5, backend="fused")
    fwd, rev = (gla(*x[:3], g, reverse=g is x.g_rev, scale=0.25, backend="naive") for g in x[3:5])
    half = 48 if halves else 0  # in its half of the tokens each scan is the first
    assert torch.equal(kept[0], torch.cat([fwd[:, :, :half], rev[:, :, half:]], 2))


def test_every_place_in_scratch_memory_is_written(monkeypatch, keep, segments_of, halves):
    """Fresh memory is NaN: heads, segments or blocks of V that share a place would leave another as it was."""
    segments_of(32)
    monkeypatch.setattr(launch, "LINE", 1000)  # bytes, more than the 140 of a row of o: its share in scratch memory
    kept = keep("_share", "_states", "_meeting")
    evaluate(fused.bidirectional_gla, on_device(1, 2, 70, 40, 35), scale=0.5)
    assert len(kept) == (6 if halves else 3)
    assert not any(memory.isnan().any() for memory in kept)


@pytest.mark.parametrize("bound", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize(
    ("tokens", "sizes", "dtype"),
    [
        (32, (37, 40, 35), torch.float32),
        pytest.param(64, (100, 32, 64), torch.bfloat16, marks=pytest.mark.gpu),  # fetched ahead of the stores
        pytest.param(64, (100, 32, 70), torch.bfloat16, marks=pytest.mark.gpu),
    ],
)
def test_the_share_of_o_may_lie_where_o_will(monkeypatch, segments_of, tokens, sizes, dtype, bound):
    """The same bits as with scratch memory."""
    segments_of(tokens)
    set_bounds(monkeypatch, bound)
    x, got = on_device(1, 2, *sizes, dtype=dtype), []
    for line in (0, 1000):
        monkeypatch.setattr(launch, "LINE", line)
        got.append(bidirectional_gla(*x[:5], scale=0.5, backend="fused"))
    assert torch.equal(*got)


@pytest.mark.parametrize(
    ("V", "dtype", "dot", "directions", "where_o_will_be"),
    [
        (64, torch.bfloat16, "bf16", 2, True),
        (63, torch.bfloat16, "bf16", 2, False),
        (32, torch.float32, "ieee", 2, True),
        (64, torch.float16, "tf32", 2, False),
        (8, torch.float16, "tf32", 1, True),
    ],
)
def test_where_the_share_of_o_lies(V, dtype, dot, directions, where_o_will_be):
    """Where o will be if a row fills a cache line and is as precise as products are; or if nobody writes a share."""
    o = torch.empty(1, 2, 5, V, dtype=dtype)
    g = torch.empty(1, 2, 5, 32)
    options = launch.constants((32, 64), dot, backward=False)
    assert (launch._share(o, g, g if directions == 2 else None, options) is o) == where_o_will_be


@interpreted
@pytest.mark.parametrize("bound", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("sizes", [(53, 32, 64), (53, 16, 32)], ids=str)
def test_states_may_be_kept_where_the_gradients_go(monkeypatch, segments_of, sizes, bound):
    """As with bfloat16 on a GPU, for the heads of ViG: the same bits as with rounded states in scratch memory."""
    segments_of(32)
    set_bounds(monkeypatch, bound)
    x = draw(1, 2, *sizes, regime="moderate", dtype=torch.bfloat16, gate_dtype=torch.float32)
    states, got = launch._states, []
    for place in (lambda *a: states(*a).bfloat16(), lambda v, *_: v.new_empty(0)):
        monkeypatch.setattr(launch, "_states", place)
        both = evaluate(fused.bidirectional_gla, x, scale=0.5)
        got.append([*both.values(), *one_direction(x)])
    assert all(torch.equal(a, b) and not a.isnan().any() for a, b in zip(*got, strict=True))


@pytest.mark.parametrize(
    ("K", "V", "gates", "dot", "kept"),
    [
        (32, 64, torch.float32, "bf16", True),
        (16, 32, torch.float32, "bf16", True),
        (31, 64, torch.float32, "bf16", False),
        (32, 65, torch.float32, "bf16", False),
        (40, 32, torch.float32, "bf16", False),
        (32, 64, torch.bfloat16, "bf16", False),
        (32, 64, torch.float32, "ieee", False),
    ],
)  # fmt: skip
def test_states_are_kept_where_the_gradients_go_only_if_two_fit(K, V, gates, dot, kept):
    q, v = (torch.empty(1, 2, 20, D, dtype=torch.bfloat16) for D in (K, V))
    g = torch.empty(1, 2, 20, K, dtype=gates)
    cut = launch._cut(q, v, g, g)
    options = launch.constants(cut.tile, dot, backward=True)
    assert (launch._states(v, [q, q, v, g, g], cut, options).numel() == 0) == kept
    if kept:  # bytes that a chunk's gradients take, and its two states in bfloat16
        assert C * sum(t.element_size() * t.shape[3] for t in (q, q, v, g, g)) >= 2 * 2 * options["BK"] * options["BV"]


def one_direction(x: Inputs) -> list[torch.Tensor]:
    """Gradients of the scans alone, which keep one state for every chunk."""
    grads = []
    for g, reverse in ((x.g_fwd, False), (x.g_rev, True)):
        leaves = [t.detach().clone().requires_grad_() for t in (x.q, x.k, x.v, g)]
        grads += torch.autograd.grad(fused.gla(*leaves, reverse=reverse, scale=0.5), leaves, x.do)
    return grads


# --- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", PATHS.values(), ids=PATHS)
def test_each_path_alone_is_bitwise_equal_on_dyadic_inputs(monkeypatch, bound):
    set_bounds(monkeypatch, bound)
    same_bits(gentle(37, 5, 7, seed=0))


@pytest.mark.skipif(not launch.INTERPRETED, reason="the compiled layer takes no float64")
@pytest.mark.parametrize("bound", PATHS.values(), ids=PATHS)
def test_each_path_alone_equals_the_oracle(monkeypatch, bound):
    set_bounds(monkeypatch, bound)
    judge(on_device(1, 1, 37, 5, 7, dtype=torch.float64))


@pytest.mark.parametrize("bound", PATHS.values(), ids=PATHS)
def test_first_gate_of_each_scan_has_no_gradient_on_either_path(monkeypatch, bound):
    """0, and not only nearly, though the fast path adds up terms that merely cancel there."""
    set_bounds(monkeypatch, bound)
    got = evaluate(fused.bidirectional_gla, on_device(1, 1, 37, 5, 7), scale=0.5)
    assert (got["dg_fwd"][:, :, 0] == 0).all()
    assert (got["dg_rev"][:, :, -1] == 0).all()
    assert (got["dg_fwd"][:, :, 1:] != 0).all()


@interpreted
@pytest.mark.parametrize("gate", [-100.0, -INF])
@pytest.mark.parametrize(("reverse", "t"), [(False, 5), (True, 27)])
def test_one_strong_gate_makes_one_segment_compute_again(segments_of, recomputed, reverse, t, gate):
    """A gate of the chunk that the scan meets first, so that the last exponent is a small one."""
    segments_of(32)
    x = on_device(1, 1, 49, 3, 4, regime="keep")
    x[3 + reverse][:, :, t, 1] = gate
    judge(x)
    assert set(recomputed) == {("forward", 0, 32), ("backward", 0, 32)}


def worst_case(exponent: float, where: str, T: int) -> Inputs:
    """Gates that forget `exponent`, in base 2, between the middles of two chunks, or behind the last one."""
    x = on_device(1, 1, T, 3, 4, regime="keep")
    if where == "everywhere":
        x.g_fwd[:] = x.g_rev[:] = exponent * LOG2 / C
    elif where == "inside":
        x.g_fwd[:, :, T // 2] = x.g_rev[:, :, T // 2] = exponent * LOG2
    elif where == "last token":
        x.g_fwd[:, :, -1] = exponent * LOG2
    elif where == "first token":
        x.g_rev[:, :, 0] = exponent * LOG2
    return x


@interpreted
@pytest.mark.parametrize(
    ("which", "where"),
    [("forward", where) for where in ("everywhere", "inside", "last token", "first token")]
    + [("backward", where) for where in ("everywhere", "inside")],
)
def test_both_sides_of_the_bound(recomputed, which, where):
    """Just above it the fast path is kept, just below it left, and either agrees with the oracle."""
    bound = {"forward": launch.BOUND, "backward": launch.BOUND_BACKWARD["ieee"]}[which]
    for factor, again in ((0.99, False), (1.01, True)):
        judge(worst_case(bound * factor, where, 32))
        assert (which in {call[0] for call in recomputed}) == again, (factor, recomputed)
        recomputed.clear()


@interpreted
def test_the_gradient_of_a_gate_just_above_the_bound_keeps_its_digits():
    """Measured by itself: `bounds` measures by what is subtracted, and would let this much smaller number go."""
    x = worst_case(launch.BOUND_BACKWARD["ieee"] * 0.99, "inside", 32)
    got, exact = evaluate(fused.bidirectional_gla, x, scale=0.5), reference(x, scale=0.5)
    for name in ("dg_fwd", "dg_rev"):
        gate = exact[name][:, :, 16]
        assert (got[name][:, :, 16] - gate).norm() <= 1e-5 * gate.norm(), name


@pytest.mark.parametrize(("gate", "inputs"), [(-89, 2**20), (-79, 2**26), (-39, 2**36)])
def test_the_bound_leaves_room_for_large_inputs(gate, inputs):
    """float32 ends at 2^128: k v 2^79 in half a chunk is too much for the fast path, with k and v of 2^26."""
    x = on_device(1, 1, 32, 3, 4, regime="keep")
    x.g_fwd[:, :, 11] = x.g_rev[:, :, 21] = gate * LOG2
    judge(x._replace(q=inputs * x.q, k=inputs * x.k, v=inputs * x.v))


def test_the_bound_leaves_room_for_small_keys():
    """A key of 2^-60 and a query of 2^60: k 2^-79 would lose digits, or all, below the normal numbers of float32."""
    x = on_device(1, 1, 32, 3, 4, regime="keep")
    x.g_fwd[:, :, 7] = x.g_rev[:, :, 24] = -79 * LOG2
    judge(x._replace(q=2.0**60 * x.q, k=2.0**-60 * x.k))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("T", "strong"), [(1, -INF), (13, -100.0), (32, -INF)])
def test_one_strong_gate_where_a_scan_ends(T, strong, reverse):
    """Half a chunk there lies behind the last middle: no state passes it, but its exponents count."""
    x = on_device(1, 1, T, 3, 4)
    x[3 + reverse][:, :, 0 if reverse else -1] = strong
    judge(x)


@pytest.mark.parametrize("regime", ["vig", "strong"])
def test_nan_in_a_gate_stays_nan(segments_of, regime):
    """Whatever the path, and across segments: what the oracle calls NaN is not a number here either."""
    segments_of(32)
    x = on_device(1, 1, 33, 3, 4, regime=regime)
    x.g_fwd[:, :, 29, 1] = torch.nan
    x.g_rev[:, :, 32, 1] = torch.nan
    got = evaluate(fused.bidirectional_gla, x, scale=0.5)
    expected = evaluate(naive.bidirectional_gla, Inputs(*(t.cpu() for t in x)), scale=0.5)
    expected["dg_fwd"][:, :, 0] = expected["dg_rev"][:, :, -1] = 0  # known without computing
    for name in NAMES:
        assert got[name].cpu()[expected[name].isnan()].isnan().all(), name


# --- dtypes and strides -----------------------------------------------------------------------------------------------


def test_gradients_are_laid_out_as_the_compiler_is_told():
    """The backward pass is an operator of its own to torch.compile: its fake results have true strides and dtypes."""
    x = on_device(1, 2, 3, 3, 4, dtype=torch.float16, gate_dtype=torch.float32)
    arguments = (*x[:5], launch._entering(x.v, launch._cut(x.q, x.v, x.g_fwd, x.g_rev)), x.do, 0.5, "ieee")
    torch.library.opcheck(launch._backward, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("layer", LAYERS)
def test_one_direction_gives_back_the_dtype_that_came(layer):
    x = draw(1, 1, 3, 3, 4, dtype=torch.float16, gate_dtype=torch.float32, device=device_of(layer))
    assert gla(*x[:4], backend=layer).dtype == torch.float16
