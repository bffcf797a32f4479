"""The fused layer's launches without the arithmetic of their walks, for `vig-ref bench limits`. Its results are wrong.

The walks of `vig_ref/fused/anchored.py` again, with the same loads and stores in the same loops. In between they only
add up what they load, since the compiler leaves out a load that nothing depends on. All else is the fused layer's own:
the launches, the small kernels for segments, the exact path, which is compiled but not taken, and so most registers; in
the first walk of the backward pass there are fewer, and more programs share a multiprocessor.
"""

import contextlib
import functools
import importlib.util
from collections.abc import Iterator
from types import ModuleType

import triton
import triton.language as tl

from vig_ref.fused import kernels, launch
from vig_ref.fused.blocks import ROWS, C, chunk, keep, kept, load, other_share, store, store_share


@contextlib.contextmanager
def without_arithmetic() -> Iterator[None]:
    """The fused layer launches these walks instead of its own."""
    launch.kernels = bare_kernels()
    try:
        yield
    finally:
        launch.kernels = kernels


@functools.cache
def bare_kernels() -> ModuleType:
    """A second copy of the module of the kernels, in which the names of the walks mean those of this file."""
    spec = importlib.util.spec_from_file_location("vig_ref.fused.bare_kernels", kernels.__file__)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module).update({walk.__name__: walk for walk in (forward_anchored, states_anchored, gradients_anchored)})
    return module


@triton.jit
def _sum(tile, tileT):
    """What was added up, as a number; tiles lie differently in the threads, so that they cannot be added before."""
    return tl.sum(tl.sum(tile, 1), 0) + tl.sum(tl.sum(tileT, 1), 0)


@triton.jit
def _prepare(q, k, g, at, T, K, BK: tl.constexpr, ACC: tl.constexpr):
    return load(q, at, T, K, BK).to(ACC) + load(k, at, T, K, BK).to(ACC) + load(g, at, T, K, BK).to(ACC)


@triton.jit
def forward_anchored(
    q, k, v, g, o, share, S, scale, first, count, step, T, K, V,
    DOT: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    BV: tl.constexpr = S.shape[0]
    BK: tl.constexpr = S.shape[1]
    ACC: tl.constexpr = S.dtype
    b_sum = tl.zeros((C, BK), ACC)
    b_sumT = tl.zeros((BV, C), ACC)
    if EARLY:
        b_sum += _prepare(q, k, g, chunk(first, step), T, K, BK, ACC)
    for i in tl.range(count, num_stages=STAGES):
        at = chunk(first + i * step, step)
        b_v = load(v, at, T, V, BV)
        b_sumT += load(v, at, T, V, BV, TRANSPOSED=True).to(ACC)
        there = chunk(first + tl.minimum(i + 1, count - 1) * step, step) if EARLY else at
        b_sum += _prepare(q, k, g, there, T, K, BK, ACC)
        store_share(o, b_v.to(ACC) + other_share(share, at, T, V, BV, ACC), at, T, V)
    total = _sum(b_sum, b_sumT)
    return S + total, tl.zeros((ROWS // 2, BK), ACC) + 0.0 * total  # no exponent is too small


@triton.jit
def states_anchored(
    q, k, v, g_own, g_opp, do, dq, dk, dv, dg_own, dg_opp, p_S, p_dS, S, dS,
    scale, first, count, step, T, K, V,
    DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    BV: tl.constexpr = S.shape[0]
    BK: tl.constexpr = S.shape[1]
    ACC: tl.constexpr = S.dtype
    b_sum = tl.zeros((C, BK), ACC)
    b_sumT = tl.zeros((BV, C), ACC)
    for i in tl.range(count, num_stages=STAGES):
        n = first + i * step
        at = chunk(n, step)
        if g_own is not None:
            b_sum += load(g_own, at, T, K, BK).to(ACC) + load(k, at, T, K, BK).to(ACC)
            b_sumT += load(v, at, T, V, BV, TRANSPOSED=True).to(ACC)
            keep(S, p_S, n, dg_own, dv, None, T)
        if g_opp is not None:
            b_sum += load(g_opp, at, T, K, BK).to(ACC) + load(q, at, T, K, BK).to(ACC)
            b_sumT += load(do, at, T, V, BV, TRANSPOSED=True).to(ACC)
            keep(dS, p_dS, n, dg_opp, dq, dk, T)
    total = _sum(b_sum, b_sumT)
    return S + total, dS + total, tl.zeros((ROWS // 2, BK), ACC) + 0.0 * total


@triton.jit
def gradients_anchored(
    q, k, v, g_own, g_opp, do, dq, dk, dv, dg_own, dg_opp, p_S, p_dS, S, dS,
    scale, first, count, step, T, K, V,
    DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    BV: tl.constexpr = S.shape[0]
    BK: tl.constexpr = S.shape[1]
    ACC: tl.constexpr = S.dtype
    b_sum = tl.zeros((BV, BK), ACC)
    b_sumT = tl.zeros((BV, C), ACC)
    for i in tl.range(count, num_stages=STAGES):
        n = first + i * step
        at = chunk(n, step)
        b_q = load(q, at, T, K, BK)
        b_k = load(k, at, T, K, BK)
        b_v = load(v, at, T, V, BV)
        b_do = load(do, at, T, V, BV)
        if BV < 64:
            b_sumT += load(v, at, T, V, BV, TRANSPOSED=True).to(ACC)
            b_sumT += load(do, at, T, V, BV, TRANSPOSED=True).to(ACC)
        if g_opp is not None:
            b_g = load(g_opp, at, T, K, BK)
            b_sum += kept(p_S, n, dg_opp, dv, None, T, BV, BK).to(ACC)
            store(dg_opp, b_g, at, T, K)
        if g_own is not None:
            b_g = load(g_own, at, T, K, BK)
            b_sum += kept(p_dS, n, dg_own, dq, dk, T, BV, BK).to(ACC)
            store(dg_own, b_g, at, T, K)
        store(dq, b_q, at, T, K)
        store(dk, b_k, at, T, K)
        store(dv, b_v.to(ACC) + b_do.to(ACC), at, T, V)
    total = _sum(b_sum, b_sumT)
    if total != total:  # for the compiler, which does not know that no input is NaN
        store(dv, tl.zeros((C, BV), ACC) + total, chunk(first, step), T, V)
