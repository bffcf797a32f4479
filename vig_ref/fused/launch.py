"""From PyTorch to the kernels: what is allocated, what is launched, and how autograd and torch.compile see it."""

import contextlib
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from triton.runtime.interpreter import InterpretedFunction

from vig_ref.fused import kernels

CHUNK: int = kernels.C.value


class Warps(NamedTuple):
    """Warps of a program: with bfloat16; with tf32; without tensor cores."""

    forward: int  # and in `segment_kernel`
    backward: int
    tf32: int
    ieee: int


#: The tiles that hold a state in registers, (columns BK, rows BV). The first that is large enough is taken, or the
#: last; a V larger than its rows is cut into blocks. The first two are the heads of ViG-H and ViG. (With tf32, products
#: of 64 rows by four warps are wrong in Triton 3.6.)
TILES = {(16, 32): Warps(1, 2, 4, 4), (32, 64): Warps(2, 4, 2, 4), (128, 32): Warps(4, 8, 8, 8)}
#: Registers of a thread in `forward_kernel` and `segment_kernel`, where the compiler would take more than it needs.
#: With bfloat16 six programs of two warps, twelve of one, then share a multiprocessor. With fewer registers they spill,
#: and so do the other kernels with these.
REGISTERS = {(16, 32): 168, (32, 64): 168}
MAX_K = max(BK for BK, _ in TILES)
#: Tokens of a sequence that is not cut, and of a segment at most, unless that makes more than MAX_SEGMENTS. A multiple
#: of CHUNK.
SEGMENT = 256
MAX_SEGMENTS = 256
#: From so many sequences on, counted once for each block of V, two programs for each fill an H200, which has 132
#: multiprocessors. Then long ones are halved, not cut into segments.
MANY = 128
#: The smallest exponent, in base 2, with which the fast path may go on: a sum of gates between the middles of
#: neighbouring chunks, or from an end to the middle next to it. The forward pass multiplies by exp(b) and exp(-b), and
#: 2^40 leaves q, k and v most of the range of float32, up to 2^88 of 2^128. In the gates' gradients, terms of size 1
#: cancel to terms of size 2^BOUND, which must not be lost in the roundoff of sums.
BOUND = -40.0
BOUND_BACKWARD = {"bf16": -8.0, "tf32": -8.0, "ieee": -2.0}
#: Chunks in shared memory, all but one fetched ahead, for bfloat16. In the tile that is not of ViG only those of
#: `segment_kernel` would fit; the other kernels fetch nothing ahead there.
STAGES = 3
#: The same for the first walk of the backward pass, which loads less.
STATES_STAGES = 4
#: The same where few programs hide little of each other's waits: `half_kernel`, and `segment_kernel` if `_few`.
MORE_STAGES = 5
#: Bytes of a cache line.
LINE = 128
PRECISIONS = ("ieee", "tf32")
#: Whether Triton was imported with TRITON_INTERPRET=1: a process interprets kernels or compiles them, never both.
INTERPRETED = isinstance(kernels.forward_kernel, InterpretedFunction)


def bidirectional_gla(
    q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_rev: Tensor, *, scale: float, precision: str = "ieee"
) -> Tensor:
    """Eq. 6 in one launch, or two or three if T > SEGMENT. See `vig_ref.bidirectional_gla`.

    Args:
        precision: the products of float32 inputs, "ieee" or "tf32". float16 inputs always use tf32 operands (scores of
            large inputs do not fit in float16), bfloat16 inputs bfloat16 ones. The interpreter rounds no operands.

    Raises:
        ValueError: a device, dtype or K that the kernel does not take, or an unknown precision.
        NotImplementedError: a forward-mode derivative is asked for, or, in the backward pass, a second one.
    """
    return _checked(q, k, v, g_fwd, g_rev, scale / 2, precision)


def gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, reverse: bool, scale: float, precision: str = "ieee"
) -> Tensor:
    """Eq. 5 in one launch, or three if T > SEGMENT. See `vig_ref.gla` and `bidirectional_gla` above."""
    return _checked(q, k, v, None if reverse else g, g if reverse else None, scale, precision)


def _checked(
    q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor | None, g_rev: Tensor | None, scale: float, precision: str
) -> Tensor:
    instead = "choose backend='chunked' or 'naive'"
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; choose one of {PRECISIONS}")
    if INTERPRETED and precision != "ieee":
        raise ValueError(f"precision {precision!r} needs a GPU; Triton's interpreter multiplies as 'ieee' only")
    if not INTERPRETED and q.device.type != "cuda":
        raise ValueError(
            f"backend 'fused' needs CUDA tensors, got {q.device.type}; {instead}, or set TRITON_INTERPRET=1 before "
            "Python starts to run the kernel in Triton's interpreter (slow, for learning and testing)"
        )
    if torch.version.hip and not INTERPRETED:
        raise ValueError(f"backend 'fused' is written for NVIDIA GPUs, got an AMD one; {instead}")
    if not INTERPRETED and q.dtype == torch.float64:
        raise ValueError(f"backend 'fused' takes float32, float16 and bfloat16, got float64; {instead}")
    _refuse_tangents(*(x for x in (q, k, v, g_fwd, g_rev) if x is not None))
    if q.shape[3] > MAX_K:
        raise ValueError(f"backend 'fused' takes K up to {MAX_K}, got {q.shape[3]}; {instead}")
    return _forward(q, k, v, g_fwd, g_rev, scale, precision)[0]


def _refuse_tangents(*tensors: Tensor) -> None:
    """Of forward-mode derivatives, which PyTorch would take for 0."""
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError("backend 'fused' has no forward-mode derivative; choose backend='chunked' or 'naive'")


class Cut(NamedTuple):
    """How a call is divided into programs, in both passes; see also `_meet_backward`."""

    halves: bool  # or else segments, of which there may be one
    tile: tuple[int, int]  # BK, BV
    grid: tuple[int, int, int]  # sequences, one for each batch and head; blocks of V; scans of two halves, or segments
    sizes: tuple[int, int, int, int, int]  # H, T, K, V, and the tokens of the first half, or of a segment


def _cut(q: Tensor, v: Tensor, g_fwd: Tensor | None, g_rev: Tensor | None) -> Cut:
    """Long sequences into halves where they are many, otherwise into segments.

    Halves want both gates, of one dtype: a program chooses one as it runs, and both need be pointers to one type.
    torch.export has to know on which side of MANY a number of images is.
    """
    B, H, T, V = v.shape
    K = q.shape[3]
    tile = _tile(K, V)
    sequences, blocks = B * H, _cdiv(V, tile[1])
    both = g_fwd is not None and g_rev is not None and g_fwd.dtype == g_rev.dtype
    halves = both and T > SEGMENT and sequences * blocks >= MANY
    programs, tokens = (2, _cdiv(T, 2 * CHUNK) * CHUNK) if halves else (_segments(T), _segment(T))
    return Cut(halves, tile, (sequences, blocks, programs), (H, T, K, V, tokens))


def _meet_backward(cut: Cut, places: int) -> Cut:
    """Halves for the backward pass, where only so many programs of the second walk find a place at once.

    One program of each sequence is long, and comes first. If a quarter of the short ones or more find a place beside
    these, the short ones follow each other there, in n rounds, and half 0 gets n / (n + 1) of the tokens, so that all
    take as long. Otherwise halves are even. (More rounds gain less, and cost the first walk, where all have a place.)
    With 192 sequences and 264 places, 192 short programs share 72 places in 3 rounds, and half 0 gets 3/4.
    """
    H, T, K, V, _ = cut.sizes
    long = cut.grid[0] * cut.grid[1]
    rounds = _cdiv(long, places - long) if 4 * (places - long) >= long else 1
    return cut._replace(sizes=(H, T, K, V, _cdiv(rounds * T, (rounds + 1) * CHUNK) * CHUNK))


def _at_once(x: Tensor, warps: int) -> int:
    """How many programs run at once if a thread has 255 registers: 8 warps a multiprocessor. (An H200 has 132.)"""
    multiprocessors = 132 if INTERPRETED else torch.cuda.get_device_properties(x.device).multi_processor_count
    return multiprocessors * 8 // warps


def _tile(K: int, V: int) -> tuple[int, int]:
    return next((BK, BV) for BK, BV in TILES if BK >= K and (BV >= V or BK == MAX_K))


@torch.library.custom_op("vig_ref::gla_forward", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor | None, g_rev: Tensor | None, scale: float, precision: str
) -> tuple[Tensor, Tensor]:
    """o, and the states that enter each segment, which the backward pass wants again."""
    cut = _cut(q, v, g_fwd, g_rev)
    o, S_enter = _empty(v), _entering(v, cut)
    if o.numel():
        far = _far(q, k, v, g_fwd, g_rev, o)
        options = _options(q, cut.tile, precision, backward=False, far=far)
        tensors = [_strided(x) for x in (q, k, v, g_fwd, g_rev, o, _share(o, g_fwd, g_rev, options))]
        with _device(q):
            if cut.halves:
                S_meet = _meeting(v, cut)
                for second in (False, True):
                    kernels.half_kernel[cut.grid](
                        *tensors, S_meet, scale, *cut.sizes,
                        **half_constants(options, dense=_dense(g_fwd, g_rev), few=_few(cut.grid), second=second),
                    )
            else:
                _enter(k, v, g_fwd, g_rev, 1.0, S_enter, False, cut, options)
                kernels.forward_kernel[cut.grid](*tensors, _or_none(S_enter), scale, *cut.sizes, **options)
    return o, S_enter


@torch.library.custom_op("vig_ref::gla_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor | None, g_rev: Tensor | None, S_enter: Tensor, do: Tensor,
    scale: float, precision: str,
) -> list[Tensor]:
    inputs = [x for x in (q, k, v, g_fwd, g_rev) if x is not None]
    grads = [_empty(x) for x in inputs]
    if not do.numel():  # with V = 0 there are gradients, of 0
        return [grad.zero_() for grad in grads]
    cut = _cut(q, v, g_fwd, g_rev)
    options = _options(q, cut.tile, precision, backward=True, far=_far(*inputs, do, *grads))
    if cut.halves:
        cut = _meet_backward(cut, _at_once(q, options["num_warps"]))
    _, blocks, _ = cut.grid
    parts = grads if blocks == 1 else [grad if n == 2 else _parts(inputs[n], blocks) for n, grad in enumerate(grads)]
    dq, dk, dv, *dg = (_strided(x) for x in parts)
    dS_enter = _entering(v, cut)
    states = [_or_none(_states(v, parts, cut, options)) for _ in range(2)]
    enter = [_meeting(v, cut) for _ in range(2)] if cut.halves else [_or_none(S_enter), _or_none(dS_enter)]
    exact = q.new_empty(math.prod(cut.grid), dtype=torch.int32)
    dense = cut.halves and _dense(g_fwd, g_rev)
    with _device(q):
        _enter(q, do, g_fwd, g_rev, scale, dS_enter, True, cut, options)
        for second in (False, True):
            walk = backward_constants(options, halves=cut.halves, dense=dense, second=second)
            kernels.backward_kernel[cut.grid](
                *(_strided(x) for x in (q, k, v, g_fwd, g_rev, do)),
                dq, dk, dv, None if g_fwd is None else dg[0], None if g_rev is None else dg[-1], *states, *enter,
                exact, scale, *cut.sizes, **walk,
            )  # fmt: skip
    for grad, part in zip(grads, parts, strict=True):
        if part is not grad:
            grad.copy_(part.unflatten(0, (blocks, -1)).sum(0))
    return grads


def _enter(
    x: Tensor, y: Tensor, g_fwd: Tensor | None, g_rev: Tensor | None, scale: float, enter: Tensor, gradient: bool,
    cut: Cut, options: dict,
) -> None:
    """Fill `enter` with what enters each segment, if there are several. x, y: see `kernels.segment_kernel`."""
    if not enter.numel():
        return
    sequences, blocks, segments = cut.grid
    BK, BV = cut.tile
    decay = _decays(enter)
    kernels.segment_kernel[cut.grid](
        *(_strided(each) for each in (x, y, g_fwd, g_rev)), enter, decay, scale, *cut.sizes,
        **segment_constants(options, gradient, _few(cut.grid)),
    )  # fmt: skip
    directions = (g_fwd is not None) + (g_rev is not None)
    kernels.combine_kernel[sequences * blocks, directions, BV * BK // kernels.CELLS.value](
        enter, decay, segments, **combine_constants(options, g_fwd is not None, gradient)
    )


@_forward.register_fake
def _(q, k, v, g_fwd, g_rev, scale, precision):
    if v.shape[2] <= SEGMENT:  # any K and V will do: torch.compile need not know which tile they take
        return _empty(v), _nothing(v)
    return _empty(v), _entering(v, _cut(q, v, g_fwd, g_rev))


@_backward.register_fake
def _(q, k, v, g_fwd, g_rev, S_enter, do, scale, precision):
    return [_empty(x) for x in (q, k, v, g_fwd, g_rev) if x is not None]


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # S_enter has no gradient, and needs no zeros for one
    *tensors, ctx.scale, ctx.precision = inputs
    ctx.save_for_backward(*tensors, output[1])


def _differentiate(ctx, do, _):
    if do is None:  # nothing depends on o
        return (None,) * 7
    _refuse_tangents(do)
    q, k, v, g_fwd, g_rev, S_enter = ctx.saved_tensors
    dq, dk, dv, *dg = _backward(q, k, v, g_fwd, g_rev, S_enter, do, ctx.scale, ctx.precision)
    dg_fwd = None if g_fwd is None else dg[0]
    dg_rev = None if g_rev is None else dg[-1]
    return dq, dk, dv, dg_fwd, dg_rev, None, None


def _refuse(ctx, *_):
    raise NotImplementedError("backend 'fused' has no second derivative; choose backend='chunked' or 'naive'")


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)


def _device(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device. The interpreter's numpy warns where the fast path overflows, as it may:
    its results are then thrown away."""
    return np.errstate(over="ignore", invalid="ignore") if INTERPRETED else torch.cuda.device_of(x)


def _empty(x: Tensor) -> Tensor:
    """Memory for a result like x, laid out token by token, as the projection behind the operator reads it."""
    B, H, T, D = x.shape
    return x.new_empty_strided((B, H, T, D), (T * H * D, D, H * D, 1))


def _parts(x: Tensor, blocks: int) -> Tensor:
    """Memory for what each block of V contributes to the gradient of x (q, k or a gate), stacked along B."""
    B, H, T, D = x.shape
    return x.new_empty(blocks * B, H, T, D, dtype=_wide(x))


def _meeting(v: Tensor, cut: Cut) -> Tensor:
    """Memory for the states with which programs meet, `[B * H * blocks of V, scans, BV, BK]`: a program's own, which
    may be the gradient of the opposite scan's state."""
    sequences, blocks, _ = cut.grid
    BK, BV = cut.tile
    return v.new_empty(sequences * blocks, 2, BV, BK, dtype=_wide(v))


def _dense(g_fwd: Tensor | None, g_rev: Tensor | None) -> bool:
    return all(g is None or g.stride(3) == 1 for g in (g_fwd, g_rev))


def _entering(v: Tensor, cut: Cut) -> Tensor:
    """Memory for what enters each segment, `[B * H * blocks of V, directions, segments, BV, BK]`, if there are several.

    Of a direction that is not there nothing is written. Kept for the backward pass: 64 bytes a token with the heads of
    ViG. To find them again it would read 448.
    """
    sequences, blocks, segments = cut.grid
    if cut.halves or v.shape[2] <= SEGMENT:
        return _nothing(v)
    BK, BV = cut.tile
    return v.new_empty(sequences * blocks, 2, segments, BV, BK, dtype=_wide(v))


def _decays(enter: Tensor) -> Tensor:
    """Memory for the log decay across each segment, `[B * H * blocks of V, directions, segments, BK]`."""
    return enter.new_empty(*enter.shape[:3], enter.shape[4])


def _nothing(v: Tensor) -> Tensor:
    """For no states: an operator of torch.library returns tensors."""
    return v.new_empty(0, dtype=_wide(v))


def _or_none(x: Tensor) -> Tensor | None:
    """As the kernels take it."""
    return x if x.numel() else None


def _states(v: Tensor, grads: list[Tensor], cut: Cut, options: dict) -> Tensor:
    """Scratch memory for a state of every chunk, `[B * H * blocks of V, chunks, BV, BK]`; none if both of its states
    fit in the memory of its gradients.

    They do where heads fill their tile, as ViG's, with bfloat16 and gates in float32: see `blocks._in_gradients`.
    """
    BK, BV = cut.tile
    _, T, K, V, _ = cut.sizes
    full = (K, V) == (BK, BV) and BV <= 4 * CHUNK
    if full and options["DOT"] == "bf16" and all(dg.dtype == torch.float32 for dg in grads[3:]):
        return _nothing(v)
    sequences, blocks, _ = cut.grid
    return v.new_empty(sequences * blocks, _cdiv(T, CHUNK), BV, BK, dtype=_rounded(v, options))


def _share(o: Tensor, g_fwd: Tensor | None, g_rev: Tensor | None, options: dict) -> Tensor:
    """Memory for what the scan that comes first adds to o: o itself, if it is as precise as operands of products are.

    Not if its rows are shorter than a cache line, as ViG-H's are: with scratch memory, where one head comes after the
    other, the forward pass of H-T s1 (`vig-ref bench ops`) took 9 % less on an H200.
    """
    alone = g_fwd is None or g_rev is None
    if alone or (o.dtype == _rounded(o, options) and o.shape[3] * o.element_size() >= LINE):
        return o
    return o.new_empty(o.shape, dtype=_rounded(o, options))


def _rounded(x: Tensor, options: dict) -> torch.dtype:
    """As the operands of products are rounded."""
    return torch.bfloat16 if options["DOT"] == "bf16" else _wide(x)


def _wide(x: Tensor) -> torch.dtype:
    """As sums are kept."""
    return torch.promote_types(x.dtype, torch.float32)


def _cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own costs the host 2 microseconds a call, since kernels may call it too."""
    return (a + b - 1) // b


def _segment(T: int) -> int:
    """Tokens per segment: whole chunks, and no more than the number of segments needs."""
    if T <= SEGMENT:
        return _cdiv(T, CHUNK) * CHUNK
    segments = min(_cdiv(T, SEGMENT), MAX_SEGMENTS)
    return _cdiv(T, segments * CHUNK) * CHUNK


def _segments(T: int) -> int:
    """How many there are, none of them empty: _cdiv(T, _segment(T)), as a formula that torch.export can solve for T."""
    if T <= SEGMENT:
        return 1
    if T <= SEGMENT * MAX_SEGMENTS:
        return _cdiv(T, SEGMENT)
    return _cdiv(T, _segment(T))


def _strided(x: Tensor | None) -> tuple | None:
    return None if x is None else (x, *x.stride())


def _few(grid: tuple[int, int, int]) -> bool:
    """Whether programs are at most as many as an H200's schedulers, four to a multiprocessor."""
    return math.prod(grid) <= 4 * MANY


def _options(q: Tensor, tile: tuple[int, int], precision: str, *, backward: bool, far: bool) -> dict:
    """The compile-time constants of a launch."""
    capability = (8, 0) if INTERPRETED else torch.cuda.get_device_capability(q.device)
    if capability < (8, 0):
        raise ValueError("backend 'fused' needs a GPU of compute capability 8.0 or newer; choose 'chunked' or 'naive'")
    dot = {torch.bfloat16: "bf16", torch.float16: "tf32"}.get(q.dtype, precision)
    if INTERPRETED:
        dot = "ieee"  # the interpreter multiplies the bit patterns of bfloat16
    return constants(
        tile, dot, backward=backward, double=q.dtype == torch.float64, far=far, dependent=capability >= (9, 0)
    )


def _far(*tensors: Tensor | None) -> bool:
    """Whether an offset inside a sequence may not fit in 32 bits. A block may end behind the last token and feature,
    and states in the memory of a gate's gradient are counted in bfloat16, twice as many.

    Not asked: parts of gradients and a share of o, which lie closer together than gradients and o, and scratch memory
    for states, whose addresses have 64 bits.
    """
    there = [x for x in tensors if x is not None]
    return any((x.shape[2] + 2 * CHUNK) * x.stride(2) + (x.shape[3] + MAX_K) * x.stride(3) >= 2**30 for x in there)


def constants(
    tile: tuple[int, int], dot: str, *, backward: bool, double: bool = False, far: bool = False, dependent: bool = False
) -> dict:
    """The compile-time constants of `forward_kernel`, and what others share with it, for a tile of TILES and an
    arithmetic.

    far: see `_far`; offsets of 32 bits cost fewer instructions and registers.
    dependent: whether the GPU can launch a kernel before the one ahead has ended; the kernel waits for that by itself.
    """
    return {
        "BK": tile[0], "BV": tile[1], "ACC": kernels.tl.float64 if double else kernels.tl.float32,
        "INDEX": kernels.tl.int64 if far else kernels.tl.int32, "DOT": dot, "BOUND": BOUND,
        "STAGES": STAGES if dot == "bf16" and tile[0] < MAX_K else 1,
        "num_warps": _warps(tile, dot, "backward" if backward else "forward"), "num_stages": 1,
        "maxnreg": None if backward else REGISTERS.get(tile),
        "DEPENDENT": dependent, "launch_pdl": dependent,
    }  # fmt: skip


def half_constants(options: dict, *, dense: bool, few: bool, second: bool) -> dict:
    """The compile-time constants of `half_kernel`. few: see `_few`."""
    ahead = {"STAGES": MORE_STAGES} if options["STAGES"] > 1 else {}
    early = few and options["BK"] < 32  # one warp, with bfloat16; other dtypes too, so that tests without a GPU meet it
    walk = {"DENSE": dense, "SECOND": second, "EARLY": early, "maxnreg": None}
    return options | ahead | walk


def backward_constants(options: dict, *, halves: bool, dense: bool, second: bool) -> dict:
    """The compile-time constants of `backward_kernel`."""
    ahead = {"STAGES": STATES_STAGES} if options["STAGES"] > 1 and not second else {}
    walk = {"DENSE": dense, "HALVES": halves, "SECOND": second, "BOUND": BOUND_BACKWARD[options["DOT"]]}
    return options | ahead | walk


def _warps(tile: tuple[int, int], dot: str, kind: str) -> int:
    """kind: "forward" or "backward", which only bfloat16 tells apart."""
    return getattr(TILES[tile], kind if dot == "bf16" else dot)


def segment_constants(options: dict, gradient: bool, few: bool) -> dict:
    """The compile-time constants of `segment_kernel`. few: see `_few`."""
    tile, dot = (options["BK"], options["BV"]), options["DOT"]
    kept = ("BK", "BV", "ACC", "INDEX", "DOT", "DEPENDENT", "launch_pdl")
    return {name: options[name] for name in kept} | {
        "GRADIENT": gradient, "STAGES": (MORE_STAGES if few else STAGES) if dot == "bf16" else 1,
        "num_warps": _warps(tile, dot, "forward"), "maxnreg": REGISTERS.get(tile),
    }  # fmt: skip


def combine_constants(options: dict, fwd: bool, gradient: bool) -> dict:
    """The compile-time constants of `combine_kernel`. fwd: whether there is a forward scan."""
    kept = {name: options[name] for name in ("BK", "BV", "DEPENDENT", "launch_pdl")}
    return kept | {"FWD": fwd, "GRADIENT": gradient, "num_warps": 1}
