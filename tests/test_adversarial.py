"""Known ways to get this operator wrong, by number: each broke a published kernel once, or is where one would break.

A test's number is that of its case in the list kept with the project's notes; docs/verification.md explains the method.
Results and gradients are held to the bound of `vig_ref.tolerance` for every layer that a case applies to; where a layer
must be exact, bits are compared. What needs a GPU is marked `gpu`, and `pytest -m gpu` runs it there; the other tests
run there too, and then the fused layer is compiled.

What these cases cannot see: whatever nobody has met yet. For that see tests/test_exact.py and tests/test_layers.py.
"""

import inspect
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from unittest import mock

import pytest
import torch
import triton
from packaging.requirements import Requirement
from packaging.version import Version

import test_layers
from cases import CHUNK, FUSED_ARITHMETIC, LAYERS, LAYOUTS, device_of, in_red_zone
from test_layers import check
from vig_ref import bidirectional_gla, chunked, fused, gla
from vig_ref.fused import launch
from vig_ref.tolerance import NAMES, REGIMES, Inputs, bounds, draw, evaluate, reference, worst_ratios

on_every_layer = pytest.mark.parametrize("layer", LAYERS)
INF = float("inf")


def judge(layer: str, x: Inputs, scale: float = 0.5, **options):
    check(LAYERS[layer].bidirectional_gla, x, scale=scale, chunk=CHUNK[layer], **options)


def on(layer: str, *sizes: int, **options) -> Inputs:
    return Inputs(*map(in_red_zone, draw(*sizes, device=device_of(layer), **options)))


def integers(layer: str, *sizes: int) -> Inputs:
    """Whole numbers and gates of 0: every layer computes exactly."""
    x = on(layer, *sizes, regime="keep")
    return Inputs(*(t.round() for t in x))


def half_precision_passes(layer: str, x: Inputs, name: str, scale: float = 0.5):
    """Only the elementwise bound: it knows the rounding of a stored result, the RMS limits do not."""
    dot = name if layer == "fused" and not launch.INTERPRETED else "ieee"
    got = evaluate(LAYERS[layer].bidirectional_gla, x, scale=scale)
    ratios = worst_ratios(got, x, scale=scale, chunk=CHUNK[layer], dot=dot)
    assert max(ratios.values()) <= 1, ratios


def gates(x: Inputs, change) -> Inputs:
    return x._replace(g_fwd=change(x.g_fwd), g_rev=change(x.g_rev))


# --- gates -----------------------------------------------------------------------------------------------------------


@on_every_layer
def test_01_gates_of_minus_20_to_minus_100(layer):
    x = on(layer, 1, 2, 33, 5, 7, regime="strong")
    assert -100 <= x.g_fwd.min() <= x.g_fwd.max() <= -20
    judge(layer, x)


@on_every_layer
def test_02_positive_gates_are_computed(layer):
    """Outside the contract and not looked for: the recurrence holds as long as nothing overflows."""
    judge(layer, gates(on(layer, 1, 1, 33, 5, 7), torch.abs))


@on_every_layer
def test_03_one_full_reset_anywhere(layer):
    """First, middle and last token, and both sides of a chunk's edge; each head has its own."""
    positions = [0, 7, 15, 16, 31, 32]

    def reset(g):
        g = g.clone()
        g[:, range(len(positions)), positions] = -INF
        return g

    judge(layer, gates(on(layer, 1, len(positions), 33, 3, 4), reset))


@on_every_layer
def test_04_gates_of_zero_over_a_long_sequence(layer):
    """Plain linear attention: (q k^T) v with 1 on the diagonal and 1/2 elsewhere, and whole numbers, so exactly."""
    x = integers(layer, 1, 1, 300, 3, 4)
    weight = 0.5 * (1 + torch.eye(300, device=x.q.device))
    expected = (x.q @ x.k.mT * weight) @ x.v
    assert torch.equal(bidirectional_gla(*x[:5], scale=1.0, backend=layer), expected)
    judge(layer, on(layer, 1, 1, 300, 3, 4, regime="keep"))


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [17, 49, 63, 65, 196, 197])
@on_every_layer
def test_05_length_not_a_multiple_of_the_chunk(layer, T):
    judge(layer, on(layer, 1, 1, T, 3, 4))


@pytest.mark.parametrize("T", [1, 2, 3, 15])
@on_every_layer
def test_06_length_below_a_chunk(layer, T):
    judge(layer, on(layer, 1, 2, T, 5, 7))


@pytest.mark.parametrize("poison", [torch.nan, INF, -INF])
@on_every_layer
def test_07_nan_behind_the_end(layer, poison):
    """The tensors are corners of larger ones: what lies behind their tokens and features is never read."""
    x = on(layer, 1, 2, 19, 5, 7)

    def corner(t):
        B, H, T, D = t.shape
        memory = t.new_full((B, H, T + 20, D + 20), poison)
        return memory[:, :, :T, :D].copy_(t)

    judge(layer, Inputs(*map(corner, x)))


@pytest.mark.parametrize(("K", "V"), [(1, 100), (3, 60), (17, 17), (60, 3), (100, 1)])
@on_every_layer
def test_08_dimensions_that_are_no_powers_of_two(layer, K, V):
    judge(layer, on(layer, 1, 1, 18, K, V))


@pytest.mark.parametrize(("K", "V"), [(2, 9), (9, 2), (7, 40), (40, 7)])
@on_every_layer
def test_09_dimensions_below_16_and_different(layer, K, V):
    judge(layer, on(layer, 1, 1, 18, K, V))


@pytest.mark.parametrize("tile", launch.TILES)
def test_10_tile_larger_than_the_dimension(tile):
    """By one row and one column, where a missing mask reads the neighbour."""
    BK, BV = tile
    judge("fused", on("fused", 1, 2, 18, BK - 1, BV - 1))


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@on_every_layer
def test_11_inputs_in_any_memory_layout(layer, layout):
    *tensors, do = on(layer, 1, 2, 18, 3, 4)
    judge(layer, Inputs(*map(LAYOUTS[layout], tensors), do))


@pytest.mark.parametrize("layout", LAYOUTS)
@on_every_layer
def test_12_gradient_in_any_memory_layout(layer, layout):
    """`expanded` is what `.sum().backward()` sends: one number with stride 0."""
    x = on(layer, 1, 2, 18, 3, 4)
    judge(layer, x._replace(do=LAYOUTS[layout](x.do)))


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (1, 1, 17, 1, 1), (2, 1, 1, 3, 4)], ids=str)
@on_every_layer
def test_13_storage_offset_and_sizes_of_one(layer, sizes):
    """A compiler may treat the number 1 as a constant, and an address as a multiple of 16."""
    x = on(layer, *sizes)
    judge(layer, Inputs(*map(LAYOUTS["offset_by_one"], x)), scale=1)


def spread(x: torch.Tensor, dim: int, stride: int, folder: Path) -> torch.Tensor:
    """A copy of x whose neighbours along dim are `stride` numbers apart. On CPU the memory is a file with holes."""
    n = (x.shape[dim] - 1) * stride + x[0, 0, 0].numel()
    if launch.INTERPRETED:
        memory = torch.from_file(str(folder / "sparse"), shared=True, size=n)
    else:
        memory = torch.empty(n, device="cuda")
    strides = [0, 0, 0, 1]
    strides[dim] = stride
    return memory.as_strided(x.shape, strides).copy_(x)


@pytest.mark.parametrize("dim", [0, 1, 2, 3], ids=["B", "H", "T", "K"])
def test_14_offset_beyond_32_bits(dim, tmp_path):
    """A stride of 2^30 fits in 32 bits and twice that does not."""
    sizes = [1, 1, 1, 3]
    sizes[dim] = 3
    x = on("fused", *sizes, 4)
    judge("fused", x._replace(q=spread(x.q, dim, 2**30, tmp_path)), scale=1)


@pytest.mark.parametrize("many", [1, 10**9], ids=["halves", "segments"])
@pytest.mark.parametrize("regime", ["vig", "reset"])
@pytest.mark.parametrize("name", Inputs._fields)
def test_14_offset_beyond_32_bits_in_a_later_chunk(name, regime, many, tmp_path, monkeypatch):
    """Every kernel computes addresses from its own loops, on the fast path and, after a reset, on the other."""
    monkeypatch.setattr(launch, "SEGMENT", 32)
    monkeypatch.setattr(launch, "MANY", many)
    x = on("fused", 1, 1, 50, 3, 4, regime=regime)
    judge("fused", x._replace(**{name: spread(getattr(x, name), 2, 2**26, tmp_path)}), scale=1)


@pytest.mark.parametrize("name", ["v", "do"])
def test_14_offset_beyond_32_bits_in_a_block_of_v(name, tmp_path):
    """K above 32: the second block of V begins 32 strides behind the first."""
    x = on("fused", 1, 1, 1, 33, 33)
    judge("fused", x._replace(**{name: spread(getattr(x, name), 3, 2**26, tmp_path)}), scale=1)


@pytest.mark.parametrize(
    ("T", "D", "strides", "far"),
    [(196, 64, (192, 1), False), (16_384, 64, (768, 1), False), (65, 4, (2**25, 1), True), (2, 65, (64, 2**25), True),
     (2**20, 64, (1024, 1), True), (2**20, 64, (1020, 1), False), (9, 9, (0, 0), False)],
)  # fmt: skip
def test_14_64_bits_where_they_are_wanted_and_only_there(T, D, strides, far):
    """Any tensor of a call may be the one that lies far."""
    one = torch.empty_strided((1, 1, T, D), (0, 0, *strides), device="meta")
    near = torch.empty(1, 1, 2, 2, device="meta")
    for n in range(6):
        assert launch._far(*[one if i == n else near for i in range(6)], None) == far


def test_14_results_are_asked_too_how_far_they_lie():
    """An input may lie closer together than its gradient: a constant one, expanded, has strides of 0."""
    x = on("fused", 1, 2, 3, 4, 5)
    inputs = [t.clone().requires_grad_() for t in x[:5]]
    with mock.patch.object(launch, "_far", wraps=launch._far) as far:
        o = bidirectional_gla(*inputs, backend="fused")
        grads = torch.autograd.grad(o, inputs, x.do)
    forward, backward = ([t.data_ptr() for t in call.args] for call in far.call_args_list)
    assert o.data_ptr() in forward
    assert {t.data_ptr() for t in (x.do, *grads)} <= set(backward)


def test_15_more_sequences_than_the_second_grid_axis_holds():
    """The first axis of a CUDA grid holds 2^31 - 1 programs, the others 65535: sequences belong on the first."""
    v = torch.empty(70_000, 2, 1, 16, device="meta")
    assert launch._cut(v, v, None, None).grid == (140_000, 1, 1)


@pytest.mark.gpu
def test_15_more_sequences_than_65535():
    judge("fused", on("fused", 350, 200, 2, 3, 4))


@on_every_layer
def test_16_fresh_memory_is_nan(layer):
    """PyTorch can fill what it hands out with NaN: results and scratch memory, forward and backward."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        judge(layer, on(layer, 1, 2, 19, 5, 70))
    finally:
        torch.use_deterministic_algorithms(False)


# --- launches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", FUSED_ARITHMETIC, ids=str)
@pytest.mark.parametrize("tile", launch.TILES)
def test_17_every_launch_configuration(tile, how):
    """A tile filled to the brim, in every arithmetic; each direction alone is in tests/test_exact.py."""
    x = on("fused", 1, 1, 17, *tile, dtype=how.dtype)
    judge("fused", x, dot=how.dot, **how.options)


@on_every_layer
def test_18_runs_are_bitwise_equal(layer):
    x = on(layer, 1, 2, 19, 5, 7)
    first = evaluate(bidirectional_gla, x, backend=layer)
    for _ in range(3 if layer == "fused" and launch.INTERPRETED else 100):
        again = evaluate(bidirectional_gla, x, backend=layer)
        assert all(torch.equal(first[name], again[name]) for name in NAMES)


def test_19_parts_of_a_gradient_are_added_in_float32():
    """What two blocks of V add to dq, dk and dg cancels, and would not fit into float16 before."""
    x = on("fused", 1, 1, 5, 3, 70, dtype=torch.float16)
    v, do = torch.full_like(x.v, 200), torch.full_like(x.do, 200)
    do[..., 32:64] = -200
    do[..., 64:] = 0
    got = evaluate(fused.bidirectional_gla, x._replace(v=v, do=do), scale=0.5)
    assert all(got[name].isfinite().all() for name in NAMES)


def test_19_no_update_is_lost():
    """dq, dk and dg are sums over the blocks of V: three of them, for several sequences."""
    judge("fused", on("fused", 2, 2, 17, 3, 2 * max(BV for _, BV in launch.TILES) + 1))


@pytest.mark.gpu
@pytest.mark.parametrize("how", FUSED_ARITHMETIC, ids=str)
def test_20_hopper(how):
    """Code for compute capability 9 is another program: long sequences, many of them, in every arithmetic."""
    judge("fused", on("fused", 8, 3, 196, 32, 64, dtype=how.dtype), dot=how.dot, **how.options)


def test_21_triton_of_a_version_that_was_read():
    """Within the range that the package asks for; and no block pointers, which Triton 3.9 no longer has."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    (needed,) = (r for r in map(Requirement, project["dependencies"]) if r.name == "triton")
    assert triton.__version__ in needed.specifier
    source = "".join(file.read_text() for file in Path(launch.__file__).parent.glob("*.py"))
    assert not re.search(r"make_block_ptr|tl\.advance|boundary_check", source)


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_22_tf32_only_when_asked_for(monkeypatch, setting):
    """Neither a default nor a global setting of PyTorch makes float32 products less than that."""
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        default = inspect.signature(fused.bidirectional_gla).parameters["precision"].default
        x = on("fused", 1, 1, 2, 3, 4)
        assert launch._options(x.q, launch._tile(3, 4), default, backward=False, far=False)["DOT"] == "ieee"
        assert launch._options(x.q, launch._tile(3, 4), "tf32", backward=True, far=False)["DOT"] == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


# --- dtypes ----------------------------------------------------------------------------------------------------------


def two_scans(q, k, v, g_fwd, g_rev, *, backend):
    """`gla` in both directions, with the arguments of `bidirectional_gla`."""
    return gla(q, k, v, g_fwd, backend=backend) + gla(q, k, v, g_rev, reverse=True, backend=backend)


@pytest.mark.parametrize("function", [bidirectional_gla, two_scans])
@on_every_layer
def test_23_autocast_changes_nothing(layer, function):
    """Forward inside autocast and backward outside give the bits that there are without it."""
    x = on(layer, 1, 2, 18, 3, 4)
    expected = evaluate(function, x, backend=layer)
    leaves = [t.requires_grad_() for t in x[:5]]
    with torch.autocast(device_of(layer), torch.bfloat16):
        o = function(*leaves, backend=layer)
    got = (o, *torch.autograd.grad(o, leaves, x.do))
    assert all(torch.equal(value, expected[name]) for name, value in zip(NAMES, got, strict=True))


@pytest.mark.parametrize("layer", ["chunked", "fused"])
def test_23_half_precision_with_float32_gates(layer):
    x = on(layer, 1, 2, 18, 3, 4, dtype=torch.float16, gate_dtype=torch.float32)
    half_precision_passes(layer, x, "float16")


@pytest.mark.parametrize("many", [1, 10**9], ids=["halves", "segments"])
def test_23_half_precision_in_several_segments(many, monkeypatch):
    monkeypatch.setattr(launch, "SEGMENT", 32)
    monkeypatch.setattr(launch, "MANY", many)
    x = on("fused", 1, 2, 66, 3, 4, dtype=torch.float16, gate_dtype=torch.float32)
    half_precision_passes("fused", x, "float16")


@pytest.mark.parametrize("layer", ["chunked", "fused"])
def test_24_half_precision_gates(layer):
    """bfloat16, but for the interpreter, which does not round when it stores that."""
    name = "float16" if layer == "fused" and launch.INTERPRETED else "bfloat16"
    half_precision_passes(layer, on(layer, 1, 2, 18, 3, 4, dtype=getattr(torch, name)), name)


@on_every_layer
def test_25_gate_gradient_under_strong_decay(layer):
    """A difference of two sums over the whole sequence would lose all digits here."""
    judge(layer, gates(on(layer, 1, 2, 49, 3, 4, regime="moderate"), lambda g: 5 * g))


@on_every_layer
def test_26_every_input_alone_asks_for_its_gradient(layer):
    """The same bits as when all ask; and a result that nobody uses costs no error."""
    x = on(layer, 1, 2, 18, 3, 4)
    expected = evaluate(bidirectional_gla, x, backend=layer)
    for n in range(5):
        leaves = [t.clone().requires_grad_(m == n) for m, t in enumerate(x[:5])]
        bidirectional_gla(*leaves, backend=layer)
        (got,) = torch.autograd.grad(bidirectional_gla(*leaves, backend=layer), leaves[n], x.do)
        assert torch.equal(got, expected[NAMES[n + 1]])


@pytest.mark.parametrize("scale", [None, 1, 1.0, 0.02, 2.0, 0])
@on_every_layer
def test_27_scale(layer, scale):
    x = on(layer, 1, 1, 18, 3, 4)
    value = 3**-0.5 if scale is None else scale
    got = evaluate(bidirectional_gla, x, scale=scale, backend=layer)
    ratios = worst_ratios(got, x, scale=value, chunk=CHUNK[layer])
    assert max(ratios.values()) <= 1, ratios


@on_every_layer
def test_28_a_token_meets_itself_once_and_others_by_half(layer):
    x = integers(layer, 1, 1, 2, 3, 4)
    A = x.q @ x.k.mT
    A[..., 0, 1] /= 2
    A[..., 1, 0] /= 2
    assert torch.equal(bidirectional_gla(*x[:5], scale=2.0, backend=layer), 2 * A @ x.v)


@pytest.mark.parametrize(("layer", "lengths"), [("naive", [5]), ("chunked", [18]), ("fused", [17, 5, 33])])
def test_29_compiled_as_one_graph(layer, lengths):
    """The fused layer is one operator to the compiler, whatever the length; of the others each length is a graph."""
    compiled = torch.compile(bidirectional_gla, fullgraph=True, dynamic=len(lengths) > 1, backend="aot_eager")
    for T in lengths:
        x = on(layer, 1, 1, T, 4, 3)
        got = evaluate(compiled, x, backend=layer)
        ratios = worst_ratios(got, x, scale=0.5, chunk=CHUNK[layer])
        assert max(ratios.values()) <= 1, (T, ratios)


@pytest.mark.gpu
def test_29_cuda_graph_replay():
    x = on("fused", 1, 2, 50, 5, 7)
    bidirectional_gla(*x[:5], backend="fused")  # compiled before anything is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = bidirectional_gla(*x[:5], backend="fused")
    x.q.copy_(on("fused", 1, 2, 50, 5, 7, seed=1).q)
    graph.replay()
    assert torch.equal(o, bidirectional_gla(*x[:5], backend="fused"))


@pytest.mark.parametrize("sizes", [(0, 2, 5), (2, 0, 5), (2, 2, 0)], ids=["B=0", "H=0", "T=0"])
@on_every_layer
def test_30_empty(layer, sizes):
    x = on(layer, *sizes, 3, 4)
    leaves = [t.requires_grad_() for t in x[:5]]
    o = bidirectional_gla(*leaves, backend=layer)
    assert o.shape == x.v.shape
    grads = torch.autograd.grad(o, leaves, x.do)
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves]


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["chunked", "fused"])
def test_31_scores_beyond_the_range_of_float16(layer):
    """q and k of about 1000: their products do not fit in float16, though o does."""
    q, k, v, g_fwd, g_rev, do = on(layer, 1, 2, 18, 3, 4, gate_dtype=torch.float32)
    x = Inputs(*((t * s).half() for t, s in ((q, 1e3), (k, 1e3), (v, 1e-4))), g_fwd, g_rev, (do * 1e-4).half())
    assert x.q.abs().max() > 2000
    half_precision_passes(layer, x, "float16")


@on_every_layer
def test_31_tiny_numbers_and_zeros(layer):
    """Subnormal numbers may lose digits and become 0, but nothing else; zeros stay zeros."""
    x = on(layer, 1, 2, 18, 3, 4)
    ratios = worst_ratios(
        evaluate(bidirectional_gla, x._replace(k=x.k * 1e-39), scale=0.5, backend=layer),
        x._replace(k=x.k * 1e-39), scale=0.5, chunk=CHUNK[layer],
    )  # fmt: skip
    assert max(ratios.values()) <= 1, ratios
    got = evaluate(bidirectional_gla, x._replace(k=0 * x.k, do=0 * x.do), backend=layer)
    assert all((got[name] == 0).all() for name in NAMES)


@on_every_layer
def test_32_neighbours_in_a_batch_do_not_matter(layer):
    x = on(layer, 3, 2, 18, 3, 4)
    whole = evaluate(bidirectional_gla, x, backend=layer)
    alone = evaluate(bidirectional_gla, Inputs(*(t[1:2] for t in x)), backend=layer)
    assert all(torch.equal(whole[name][1:2], alone[name]) for name in NAMES)


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 16, 63, 64, 65, 200])
def test_33_chunk_size(chunk_size):
    x = draw(1, 2, 65, 3, 4, regime="reset")
    check(chunked.bidirectional_gla, x, scale=0.5, chunk=chunk_size, chunk_size=chunk_size)


@on_every_layer
def test_34_sizes_are_different_primes(layer):
    """An axis taken for another cannot fit."""
    judge(layer, on(layer, 2, 3, 19, 5, 7))


@on_every_layer
def test_35_inputs_and_gradient_are_not_written_to(layer):
    x = on(layer, 1, 2, 18, 3, 4)
    before = [t.clone() for t in x]
    evaluate(bidirectional_gla, x, backend=layer)
    assert all(map(torch.equal, before, x))


# --- the rest --------------------------------------------------------------------------------------------------------


@on_every_layer
def test_36_double_backward_is_right_or_refused(layer):
    """Right means: as finite differences say, along one direction per tensor."""
    x = on(layer, 1, 1, 5, 2, 3, regime="moderate", dtype=torch.float32 if layer == "fused" else torch.float64)
    leaves = [t.requires_grad_() for t in x[:5]]
    if layer == "fused":
        (dq,) = torch.autograd.grad(bidirectional_gla(*leaves, backend=layer).sum(), leaves[0], create_graph=True)
        with pytest.raises(NotImplementedError, match="no second derivative; choose backend='chunked' or 'naive'"):
            dq.sum().backward()
    else:
        assert torch.autograd.gradgradcheck(lambda *t: bidirectional_gla(*t, backend=layer), leaves, fast_mode=True)


@on_every_layer
def test_37_the_first_token_reaches_the_last(layer):
    """130 tokens apart and exactly, in both directions: dv of one token is half its score with the other."""
    x = integers(layer, 1, 1, 130, 3, 4)
    for here, there in ((0, 129), (129, 0)):
        do = torch.zeros_like(x.do)
        do[:, :, here] = 1
        got = evaluate(bidirectional_gla, x._replace(do=do), scale=2.0, backend=layer)
        expected = (x.q[:, :, here] * x.k[:, :, there]).sum(-1, keepdim=True).expand(-1, -1, 4)
        assert torch.equal(got["dv"][:, :, there], expected)


@pytest.mark.gpu
def test_38_interpreter_equals_compiler(tmp_path):
    """The same source, two machines: they may differ by as much as each may err."""
    if Version(triton.__version__) < Version("3.7"):
        pytest.skip("Triton before 3.7 cannot interpret loops beside numpy 2.4")
    code = """if True:
        import sys, torch
        from vig_ref import fused
        from vig_ref.tolerance import draw, evaluate
        torch.save(evaluate(fused.bidirectional_gla, draw(1, 2, 37, 5, 7), scale=0.5), sys.argv[1])
    """
    path = tmp_path / "interpreted.pt"
    subprocess.run([sys.executable, "-c", code, path], env=os.environ | {"TRITON_INTERPRET": "1"}, check=True)
    interpreted = torch.load(path)
    x = draw(1, 2, 37, 5, 7)
    compiled = evaluate(fused.bidirectional_gla, Inputs(*(t.cuda() for t in x)), scale=0.5)
    bound = bounds(x, reference(x, scale=0.5), scale=0.5, chunk=fused.CHUNK)
    for name in NAMES:
        assert ((compiled[name].cpu() - interpreted[name]).abs() <= 2 * bound[name]).all(), name


@on_every_layer
def test_39_errors_come_before_any_launch(monkeypatch, layer):
    """With the layer replaced by one that would fail otherwise, the contract's own error is what is raised."""

    def reached(*arguments, **options):
        raise AssertionError("a layer was called")

    monkeypatch.setattr(LAYERS[layer], "bidirectional_gla", reached)
    monkeypatch.setattr(LAYERS[layer], "gla", reached)
    q, k, v, g_fwd, g_rev, _ = on(layer, 1, 1, 2, 3, 4)
    with pytest.raises(ValueError, match="k: expected the shape of q"):
        bidirectional_gla(q, k[:, :, 1:], v, g_fwd, g_rev, backend=layer)
    with pytest.raises(ValueError, match="g: expected the shape of q"):
        gla(q, k, v, v, backend=layer)


# --- about this list -------------------------------------------------------------------------------------------------


def test_every_number_has_a_test():
    numbers = {int(match[1]) for name in globals() if (match := re.match(r"test_(\d\d)_", name))}
    assert numbers == set(range(1, 40))


def test_every_regime_and_layout_is_tried_in_every_run():
    """Not left to chance: the explicit examples, which Hypothesis runs first and always, contain each label."""
    examples = [e.kwargs["case"] for e in test_layers.test_layer_equals_the_oracle.hypothesis_explicit_examples]
    assert {case.regime for case in examples} == set(REGIMES)
    assert {case.layout for case in examples} == set(LAYOUTS)
    assert {case.gradient_layout for case in examples} == set(LAYOUTS)
