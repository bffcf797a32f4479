"""Planted bugs: would the tests know if a layer were wrong?

Each mutant is one small edit of the package's source. The command copies the project, applies the edit, runs the tests
that need no GPU, and notes which of them fail. A mutant that nothing kills is a hole in the tests, unless the edit does
not change the function; then `equivalent_because` argues it, and the run shows that all tests pass.

    python tests/mutants.py                                        all of them, a line each
    python tests/mutants.py --only carry halving                   those whose name contains a word
    python tests/mutants.py --report docs/results/mutation.json    write the record, with the method that sees it first
    python tests/mutants.py --report ... --every-method            with every method that sees it: many hours
    python tests/mutants.py --table docs/results/mutation.json     print the record as a table, method by method

The tests are also run without any bug, and must pass then. They need their packages, but neither a GPU nor vig_ref
installed; `--jobs 14` suits a machine with 16 cores, and `--report FILE --resume` goes on after an interruption. An
anchor that is not found exactly once in its file is an error: the list follows the source.
"""

import argparse
import concurrent.futures
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
#: The methods, cheapest first: what is run against every mutant, and the name of the method in the docs.
METHODS = {
    "tests/test_ops.py": "contract",
    "tests/test_exact.py": "exact arithmetic",
    "tests/test_segments.py": "segments and paths",
    "tests/test_layers.py": "oracle and bound",
    "tests/test_laws.py": "laws",
    "tests/test_fused.py": "memory and registration",
    "tests/test_adversarial.py": "adversarial cases",
    "tests/test_parts.py": "parts of the model",
}
#: By layer, tests that a bug of it cannot turn red: they are about the other layers.
UNTOUCHED = {
    "chunked": "fused or naive",
    "fused": "chunked or naive or modulo or fractions",
}
#: Seconds for one mutant: an endless loop counts as seen.
TIME_LIMIT = 900


class Mutant(NamedTuple):
    """One planted bug: in `path`, `old` (found exactly once) becomes `new`."""

    name: str
    path: str
    old: str
    new: str
    equivalent_because: str | None = None

    @property
    def layer(self) -> str:
        return Path(self.path).parent.name


CHUNKED = "vig_ref/chunked/chunks.py"
BLOCKS = "vig_ref/fused/blocks.py"
HALVING = "vig_ref/fused/halving.py"
ANCHORED = "vig_ref/fused/anchored.py"
KERNELS = "vig_ref/fused/kernels.py"
LAUNCH = "vig_ref/fused/launch.py"
PARTS = "vig_ref/parts.py"
MODEL = "vig_ref/model.py"

MUTANTS = [
    # The chunked layer: the mean of two scans.
    Mutant("chunked: mean becomes sum", CHUNKED, "return ((o_fwd + o_rev) / 2)", "return (o_fwd + o_rev)"),
    Mutant("chunked: gates swapped", CHUNKED, "o_fwd = gla(q, k, v, g_fwd,", "o_fwd = gla(q, k, v, g_rev,"),
    Mutant("chunked: both scans forward", CHUNKED, "g_rev, reverse=True", "g_rev, reverse=False"),
    Mutant("chunked: mean loses one percent", CHUNKED, "return ((o_fwd + o_rev) / 2)", "return ((o_fwd + o_rev) / 2.02)"),
    # The chunked layer: four steps.
    Mutant("chunked: no decay to the edge", CHUNKED, "S_own = (k * to_edge).mT @ v", "S_own = k.mT @ v"),
    Mutant("chunked: decay to the edge includes the token", CHUNKED, "torch.exp(decay_from(g, reverse))  #", "torch.exp(decay_to(g, not reverse))  #"),
    Mutant("chunked: state never decays", CHUNKED, "S = torch.exp(total[:, :, n]) * S + S_own[:, :, n]", "S = S + S_own[:, :, n]"),
    Mutant("chunked: state loses the past", CHUNKED, "S = torch.exp(total[:, :, n]) * S + S_own[:, :, n]", "S = S_own[:, :, n]"),
    Mutant("chunked: state after its own chunk", CHUNKED, "        S_in[n] = S\n        S = torch.exp(total[:, :, n]) * S + S_own[:, :, n]", "        S = torch.exp(total[:, :, n]) * S + S_own[:, :, n]\n        S_in[n] = S"),
    Mutant("chunked: chunks in the wrong order", CHUNKED, "for n in reversed(range(len(S_in))) if reverse else range(len(S_in)):", "for n in range(len(S_in)):"),
    Mutant("chunked: gates of the neighbouring chunk", CHUNKED, "S = torch.exp(total[:, :, n]) * S", "S = torch.exp(total[:, :, n - 1]) * S"),
    Mutant("chunked: query without decay", CHUNKED, "(q * torch.exp(decay_to(g, reverse))) @", "q @"),
    Mutant("chunked: query decay excludes the token", CHUNKED, "(q * torch.exp(decay_to(g, reverse))) @", "(q * torch.exp(decay_to(g, reverse) - g)) @"),
    Mutant("chunked: scale forgotten across chunks", CHUNKED, "return (scale * o)[", "return (scale * o + 0.01 * o)["),
    Mutant("chunked: result keeps the wide dtype", CHUNKED, "[:, :, :T].to(dtype)", "[:, :, :T]"),
    Mutant("chunked: float32 in float64", CHUNKED, "wide = torch.promote_types(q.dtype, torch.float32)", "wide = torch.float32"),
    # The chunked layer: inside a chunk.
    Mutant("chunked: token counted twice", CHUNKED, "o = (q * k).sum(-1, keepdim=True) * v  #", "o = 2 * (q * k).sum(-1, keepdim=True) * v  #"),
    Mutant("chunked: token forgotten", CHUNKED, "o = (q * k).sum(-1, keepdim=True) * v  #", "o = 0 * (q * k).sum(-1, keepdim=True) * v  #"),
    Mutant("chunked: halving stops one level early", CHUNKED, "while half < C:", "while 2 * half < C:"),
    Mutant("chunked: early and late swapped", CHUNKED, "early, late = (1, 0) if reverse else (0, 1)", "early, late = (0, 1) if reverse else (1, 0)"),
    Mutant("chunked: early half decays from the wrong side", CHUNKED, "torch.exp(decay_from(g_[..., early, :, :], reverse))", "torch.exp(decay_from(g_[..., early, :, :], not reverse))"),
    Mutant("chunked: late half does not decay", CHUNKED, "q_late = q_[..., late, :, :] * torch.exp(decay_to(g_[..., late, :, :], reverse))", "q_late = q_[..., late, :, :]"),
    Mutant("chunked: gates of the other half", CHUNKED, "torch.exp(decay_to(g_[..., late, :, :], reverse))", "torch.exp(decay_to(g_[..., early, :, :], reverse))"),
    Mutant("chunked: result lands in the early half", CHUNKED, "pair[late] = o_late", "pair[early] = o_late"),
    Mutant("chunked: reverse sum not reversed", CHUNKED, "g.flip(-2).cumsum(-2).flip(-2) if reverse else g.cumsum(-2)", "g.cumsum(-2)"),
    Mutant("chunked: difference of sums", CHUNKED, "    return decay_to(after, not reverse)", "    b = decay_to(g, reverse)\n    return (b[..., :1, :] if reverse else b[..., -1:, :]) - b"),
    Mutant("chunked: decay_from keeps the token's own gate", CHUNKED, "    return decay_to(after, not reverse)", "    return decay_to(g, not reverse)"),
    Mutant("chunked: padding forgets", CHUNKED, "(1 << (C - 1).bit_length()) - C))", "(1 << (C - 1).bit_length()) - C), value=-1.0)"),
    Mutant("chunked: last chunk dropped", CHUNKED, "N = max(1, -(-x.shape[2] // C))", "N = max(1, x.shape[2] // C)"),
    # Blocks: memory.
    Mutant("kernels: no mask at the end of the sequence", BLOCKS, "(rows < T)[:, None]", "(rows < T + 1)[:, None]"),
    Mutant("kernels: no mask at the last feature", BLOCKS, "& (cols < D)[None, :]", "& (cols < D + 1)[None, :]"),
    Mutant("kernels: one token too few", BLOCKS, "(rows < T)[:, None]", "(rows < T - 1)[:, None]"),
    Mutant("kernels: strides of token and feature swapped", BLOCKS, "rows[:, None] * stride_t + cols.to(rows.dtype)[None, :] * stride_d", "rows[:, None] * stride_d + cols.to(rows.dtype)[None, :] * stride_t"),
    Mutant("kernels: feature stride taken as 1", BLOCKS, "cols.to(rows.dtype)[None, :] * stride_d", "cols.to(rows.dtype)[None, :]"),
    Mutant("kernels: batch stride for heads", BLOCKS, "i_b * stride_b + i_h * stride_h", "i_b * stride_b + i_h * stride_b"),
    Mutant("kernels: a block of V starts where a stride of 1 would have it", BLOCKS, "+ i_d * stride_d, stride_t", "+ i_d, stride_t"),
    Mutant("kernels: features have offsets of 32 bits", BLOCKS, "cols.to(rows.dtype)[None, :] * stride_d", "cols[None, :] * stride_d"),
    Mutant("kernels: tokens of 32 bits", KERNELS, "tl.program_id(2).to(INDEX)", "tl.program_id(2)"),
    Mutant("anchored: tokens of 32 bits forward", ANCHORED, "chunk(first + i * step, step", "chunk((first + i * step).to(tl.int32), step"),
    Mutant("early: tokens of 32 bits", ANCHORED, "chunk(first + tl.minimum(i + 1, count - 1) * step, step", "chunk((first + tl.minimum(i + 1, count - 1) * step).to(tl.int32), step"),
    Mutant("segments: what one direction leaves is combined as the other's", KERNELS, "tl.program_id(1) + (0 if FWD else 1)", "tl.program_id(1)"),
    Mutant("anchored: tokens of 32 bits in the first walk backward", ANCHORED, "n = first + i * step\n        at = chunk(n, step)\n        if g_own", "n = (first + i * step).to(tl.int32)\n        at = chunk(n, step)\n        if g_own"),
    Mutant("anchored: tokens of 32 bits in the second walk backward", ANCHORED, "n = first + i * step\n        at = chunk(n, step)\n        token", "n = (first + i * step).to(tl.int32)\n        at = chunk(n, step)\n        token"),
    Mutant("halving: tokens of 32 bits forward", HALVING, "chunk(first + i * step, step", "chunk((first + i * step).to(tl.int32), step"),
    Mutant("halving: tokens of 32 bits in the first walk backward", HALVING, "n = first + i * step\n        at = chunk(n, step)\n        if g_own", "n = (first + i * step).to(tl.int32)\n        at = chunk(n, step)\n        if g_own"),
    Mutant("halving: tokens of 32 bits in the second walk backward", HALVING, "n = first + i * step\n        at = chunk(n, step)\n        b_q", "n = (first + i * step).to(tl.int32)\n        at = chunk(n, step)\n        b_q"),
    Mutant("launch: far tokens have offsets of 32 bits", LAUNCH, "(x.shape[2] + 2 * CHUNK) * x.stride(2) + (x", "(x"),
    Mutant("launch: far features have offsets of 32 bits", LAUNCH, " + (x.shape[3] + MAX_K) * x.stride(3) >=", " >="),
    Mutant("launch: results may lie farther than inputs", LAUNCH, "far=_far(*inputs, do, *grads)", "far=_far(*inputs, do)"),
    Mutant("launch: o may lie farther than inputs", LAUNCH, "_far(q, k, v, g_fwd, g_rev, o)", "_far(q, k, v, g_fwd, g_rev)"),
    Mutant("kernels: padding is one", BLOCKS, "return tl.load(pointers, mask=mask, other=0.0)", "return tl.load(pointers, mask=mask, other=1.0)"),
    Mutant("kernels: padding of transposed values is one", BLOCKS, "mask=tl.trans(mask), other=0.0)", "mask=tl.trans(mask), other=1.0)"),
    Mutant("kernels: states of neighbours overlap", BLOCKS, "return p + i.to(tl.int64) * BV * BK +", "return p + i.to(tl.int64) * BK +"),
    Mutant("kernels: states lie transposed", BLOCKS, "tl.arange(0, BV)[:, None] * BK + tl.arange(0, BK)[None, :]", "tl.arange(0, BV)[:, None] + tl.arange(0, BK)[None, :] * BV"),
    Mutant("kernels: nothing enters a segment", BLOCKS, "return tl.load(scratch(p_enter, i, BV, BK))", "return tl.zeros((BV, BK), ACC)"),
    # Blocks: gates and their sums.
    Mutant("kernels: clamp far too early", BLOCKS, "BK, ACC), -LIMIT,", "BK, ACC), -LIMIT / 100,"),
    Mutant("kernels: no clamp", BLOCKS, "return tl.maximum(load_gate(g, at, T, K, BK, ACC), -LIMIT, propagate_nan=tl.PropagateNan.ALL)", "return load_gate(g, at, T, K, BK, ACC)"),
    Mutant("kernels: natural gates taken as base 2", BLOCKS, ".to(ACC) * LOG2E", ".to(ACC)"),
    Mutant("kernels: log2(e) off in the fourth digit", BLOCKS, "1.4426950408889634", "1.4427950408889634"),
    Mutant("kernels: sums lose precision", BLOCKS, "return tl.dot(M.to(x.dtype), x, acc,", "return tl.dot(M.to(x.dtype), x.to(tl.float16).to(x.dtype), acc,"),
    Mutant("kernels: inclusive sum becomes exclusive", BLOCKS, "return t <= i if INCLUSIVE else t < i", "return t < i"),
    Mutant("kernels: inclusive sum to the right becomes exclusive", BLOCKS, "return t >= i if INCLUSIVE else t > i", "return t > i"),
    Mutant("kernels: exclusive sum becomes inclusive", BLOCKS, "return t <= i if INCLUSIVE else t < i", "return t <= i"),
    Mutant("kernels: inclusive sum of the wrong side", BLOCKS, "return t <= i if INCLUSIVE else t < i", "return t >= i if INCLUSIVE else t > i"),
    # Blocks: states.
    Mutant("kernels: state never decays", BLOCKS, "* factor[None, :, :]", "* 1.0"),
    Mutant("kernels: state decays by half a chunk", BLOCKS, "tl.full((ROWS, C), 1.0, g.dtype)", "tl.full((ROWS, C), 0.5, g.dtype)"),
    Mutant("kernels: state loses the past", BLOCKS, "return dot(tl.trans(y), xE, decayed, DOT)", "return dot(tl.trans(y), xE, 0 * decayed, DOT)"),
    Mutant("kernels: key without decay to the edge", BLOCKS, "xE = x.to(S.dtype) * exp2(sums(ahead(False, INCLUSIVE), g, DOT), DOT)", "xE = x.to(S.dtype)"),
    Mutant("kernels: key decays with its own gate too", BLOCKS, "ahead(False, INCLUSIVE)", "ahead(False, True)"),
    Mutant("kernels: query decays without its own gate", BLOCKS, "ahead(False, INCLUSIVE)", "ahead(False, False)"),
    Mutant("kernels: key decays to the other edge", BLOCKS, "ahead(False, INCLUSIVE)", "ahead(True, INCLUSIVE)"),
    # The path for every gate: scores by halving.
    Mutant("kernels: halving forward, late half exclusive", HALVING, "(right & (middle <= t) & (t <= i))", "(right & (middle <= t) & (t < i))"),
    Mutant("kernels: halving forward, early half inclusive", HALVING, "(~right & (i < t) & (t < middle))", "(~right & (i <= t) & (t < middle))"),
    Mutant("kernels: halving reverse, late half exclusive", HALVING, "(~right & (i <= t) & (t < middle))", "(~right & (i < t) & (t < middle))"),
    Mutant("kernels: halving reverse, early half inclusive", HALVING, "(right & (middle <= t) & (t < i))", "(right & (middle <= t) & (t <= i))"),
    Mutant("kernels: halving reads across blocks", HALVING, "return M, late, block == t // (2 * half)", "return M, late, block >= t // (2 * half)"),
    Mutant("kernels: middle off by one", HALVING, "middle = block * (2 * half) + half", "middle = block * (2 * half) + half + 1"),
    Mutant("kernels: scores keep the wrong half", HALVING, "dot(tl.where(late, q * E, 0.0), tl.trans(tl.where(late, 0.0, k * E)), zero, DOT)", "dot(tl.where(late, 0.0, q * E), tl.trans(tl.where(late, k * E, 0.0)), zero, DOT)"),
    Mutant("kernels: scores without blocks", HALVING, "A += tl.where(same, dot(tl.where(late, q * E, 0.0), tl.trans(tl.where(late, 0.0, k * E)), zero, DOT), 0.0)", "A += dot(tl.where(late, q * E, 0.0), tl.trans(tl.where(late, 0.0, k * E)), zero, DOT)"),
    # The path for every gate: the forward pass.
    Mutant("forward: a token does not read itself in the forward scan", HALVING, "b_o += tl.sum(b_q * b_k, 1)[:, None] * b_v", "b_o += (0.0 if step > 0 else 1.0) * tl.sum(b_q * b_k, 1)[:, None] * b_v"),
    Mutant("forward: query decays without its own gate", HALVING, "ahead(True, True), b_g, DOT), DOT)  # step 4", "ahead(True, False), b_g, DOT), DOT)  # step 4"),
    Mutant("forward: a token reads the state after its chunk", HALVING, "        b_o = dot(b_qE, tl.trans(S), b_o, DOT)\n", "        b_o = dot(b_qE, tl.trans(carry(S, b_g, b_k, b_v, False, DOT)), b_o, DOT)\n"),
    Mutant("forward: scores of the other direction", HALVING, "_middles(half, False)\n        E = exp2(sums(M, g, DOT), DOT)\n        A +=", "_middles(half, True)\n        E = exp2(sums(M, g, DOT), DOT)\n        A +="),
    Mutant("forward: scale forgotten where a program computes again", HALVING, "b_q = load(q, at, T, K, BK).to(ACC) * scale\n        b_k = load(k, at, T, K, BK).to(ACC)\n        b_v = load(v, at, T, V, BV).to(ACC)\n        b_g", "b_q = load(q, at, T, K, BK).to(ACC)\n        b_k = load(k, at, T, K, BK).to(ACC)\n        b_v = load(v, at, T, V, BV).to(ACC)\n        b_g"),
    # The path for every gate: the backward pass.
    Mutant("backward: dg without the decayed state", HALVING, "dg = zero_k + (tl.exp2(tl.sum(g, 0)) * tl.sum(S * dS, 0))[None, :]", "dg = zero_k"),
    Mutant("backward: dg state term not decayed", HALVING, "(tl.exp2(tl.sum(g, 0)) * tl.sum(S * dS, 0))[None, :]", "tl.sum(S * dS, 0)[None, :]"),
    Mutant("backward: dg counts queries alone", HALVING, "qE * dqE + kE * dkE, DOT)", "qE * dqE, DOT)"),
    Mutant("backward: dg subtracts keys", HALVING, "qE * dqE + kE * dkE, DOT)", "qE * dqE - kE * dkE, DOT)"),
    Mutant("backward: dg sums not transposed", HALVING, "dg += sums(tl.trans(M), qE * dqE + kE * dkE, DOT)", "dg += sums(M, qE * dqE + kE * dkE, DOT)"),
    Mutant("backward: dg of the entering state missing", HALVING, "    dg += sums(tl.trans(M), q * E * dqE, DOT)\n", ""),
    Mutant("backward: dg of the leaving state missing", HALVING, "    dg += sums(tl.trans(M), kE * dkE, DOT)\n", ""),
    Mutant("backward: dq without decay", HALVING, "        dq += dqE * E\n        dk", "        dq += dqE\n        dk"),
    Mutant("backward: dk of the chunk missing", HALVING, "        dk += dkE * E\n        dg", "        dg"),
    Mutant("backward: dk of the state missing", HALVING, "    dk += dkE * E\n    dg", "    dg"),
    Mutant("backward: dA not transposed", HALVING, "dot(tl.trans(dA_level), qE, zero_k, DOT)", "dot(dA_level, qE, zero_k, DOT)"),
    Mutant("backward: dA not masked by blocks", HALVING, "dA_level = tl.where(same, dA, 0.0)", "dA_level = dA"),
    Mutant("backward: scores not transposed in dv", HALVING, "b_dv = dot(tl.trans(A), b_do, b_dv, DOT)", "b_dv = dot(A, b_do, b_dv, DOT)"),
    Mutant("backward: dv of the state missing", HALVING, "dot(kE, tl.trans(dS), tl.zeros_like(v), DOT)", "tl.zeros_like(v)"),
    Mutant("backward: own token once in dq and dk", HALVING, "self_dA = SCANS * tl.sum(b_do * b_v, 1)", "self_dA = tl.sum(b_do * b_v, 1)"),
    Mutant("backward: own token missing in dv", HALVING, "SCANS * tl.sum(b_q * b_k, 1)[:, None] * b_do, A)", "0 * b_do, A)"),
    Mutant("backward: dq and dk of a token swapped", HALVING, "(self_dA * b_k, self_dA * b_q,", "(self_dA * b_q, self_dA * b_k,"),
    Mutant("backward: scale forgotten in a kept dS", HALVING, "b_q = load(q, at, T, K, BK).to(ACC) * scale\n            b_do", "b_q = load(q, at, T, K, BK).to(ACC)\n            b_do"),
    Mutant("backward: a kept dS decays as a key", HALVING, "            b_g = load_any_gate(g_opp, at, T, K, BK, ACC)\n            dS = carry(dS, b_g, b_q, b_do, True, DOT)", "            b_g = load_any_gate(g_opp, at, T, K, BK, ACC)\n            dS = carry(dS, b_g, b_q, b_do, False, DOT)"),
    Mutant("backward: the carried dS carries the key", HALVING, "            store(dg_opp, b_dg, at, T, K)\n            dS = carry(dS, b_g, b_q, b_do,", "            store(dg_opp, b_dg, at, T, K)\n            dS = carry(dS, b_g, b_k, b_do,"),
    Mutant("backward: dS of the previous chunk", HALVING, "b_dS = kept(p_dS, n,", "b_dS = kept(p_dS, tl.maximum(n - 1, 0),"),
    # The fast path: matrices and the step from middle to middle.
    Mutant("anchored: reverse, right of the middle, own gate included", ANCHORED, "(middle <= t) & (t < i), -1.0", "(middle <= t) & (t <= i), -1.0"),
    Mutant("anchored: reverse, left of the middle, own gate left out", ANCHORED, "(i <= t) & (t < middle), 1.0", "(i < t) & (t < middle), 1.0"),
    Mutant("anchored: forward, right of the middle, own gate left out", ANCHORED, "(middle <= t) & (t <= i), 1.0", "(middle <= t) & (t < i), 1.0"),
    Mutant("anchored: forward, left of the middle, own gate included", ANCHORED, "(i < t) & (t < middle), -1.0", "(i <= t) & (t < middle), -1.0"),
    Mutant("anchored: no gate is counted negative", ANCHORED, "(i < t) & (t < middle), -1.0", "(i < t) & (t < middle), 1.0"),
    Mutant("anchored: middle off by one", ANCHORED, "middle = C // 2\n", "middle = C // 2 + 1\n"),
    Mutant("anchored: left half of seven gates", ANCHORED, "(t < C // 2) != (row", "(t < C // 2 - 1) != (row"),
    Mutant("anchored: halves swapped", ANCHORED, "!= (row >= ROWS // 2)", "!= (row < ROWS // 2)"),
    Mutant("anchored: the far half of the last chunk is kept", ANCHORED, "return before + first, last", "return first, last"),
    Mutant("anchored: the near half of this chunk is kept", ANCHORED, "return before + first, last", "return before, last"),
    Mutant("anchored: no exponent is looked at", ANCHORED, "exp2(between, DOT)), between, last", "exp2(between, DOT)), 0 * between, last"),
    Mutant("anchored: only the last exponent is looked at", ANCHORED, "lowest = least(lowest, between)\n        S", "lowest = between\n        S"),
    Mutant("anchored: the largest exponent is looked at", ANCHORED, "lowest = least(lowest, between)\n        S", "lowest = tl.maximum(lowest, between)\n        S"),
    Mutant("anchored: the far half is not looked at", ANCHORED, "lowest = least(lowest, between)\n        S", "lowest = least(lowest, between - before)\n        S"),
    Mutant("anchored: the near half is not looked at", ANCHORED, "exp2(between, DOT)), between, last", "exp2(between, DOT)), before, last"),
    Mutant("anchored: the exponents of a kept S are not looked at", ANCHORED, "_advance(S, S_before, b_g, DOT)\n            lowest = least(lowest, between)\n", "_advance(S, S_before, b_g, DOT)\n"),
    Mutant("anchored: the exponents of a kept dS are not looked at", ANCHORED, "_advance(dS, dS_before, b_g, DOT)\n            lowest = least(lowest, between)\n", "_advance(dS, dS_before, b_g, DOT)\n"),
    Mutant("anchored: the last half chunk is not looked at", ANCHORED, "exp2(before, DOT)), least(lowest, before)", "exp2(before, DOT)), lowest"),
    Mutant("anchored: reverse, a token does not read itself", ANCHORED, "return i <= j if REVERSE else i >= j", "return i < j if REVERSE else i >= j"),
    Mutant("anchored: forward, a token does not read itself", ANCHORED, "return i <= j if REVERSE else i >= j", "return i <= j if REVERSE else i > j"),
    Mutant("anchored: reads what the scan has not met", ANCHORED, "return i <= j if REVERSE else i >= j", "return i >= j if REVERSE else i <= j"),
    # The fast path: the forward pass.
    Mutant("anchored: keys grow where they decay", ANCHORED, "b_kE = operand(b_k.to(ACC) * exp2(negative(b), DOT), ACC, DOT)", "b_kE = operand(b_k.to(ACC) * exp2(b, DOT), ACC, DOT)"),
    Mutant("anchored: the state is not decayed", ANCHORED, "        S = scale_columns(S, exp2(between, DOT))\n", ""),
    Mutant("anchored: a walk to the left meets chunks but not tokens from the right", ANCHORED, "chunk(first + i * step, step", "chunk(first + i * step, 1"),
    Mutant("anchored: query without decay", ANCHORED, "b_q.to(ACC) * (exp2(b, DOT) * scale)", "b_q.to(ACC) * scale"),
    Mutant("anchored: reads through the mask of the other direction", ANCHORED, "operand(tl.where(_reads(False), A, 0.0), ACC, DOT), between", "operand(tl.where(_reads(True), A, 0.0), ACC, DOT), between"),
    Mutant("anchored: scores without a mask", ANCHORED, "operand(tl.where(_reads(False), A, 0.0), ACC, DOT), between", "operand(A, ACC, DOT), between"),
    Mutant("anchored: far halves are forgotten again and again", ANCHORED, "exp2(between, DOT)), between, last", "exp2(between, DOT)), between, before + last"),
    Mutant("anchored: key without decay", ANCHORED, "b_kE = operand(b_k.to(ACC) * exp2(negative(b), DOT), ACC, DOT)", "b_kE = operand(b_k, ACC, DOT)"),
    Mutant("anchored: a chunk forgets its near half twice", ANCHORED, "return before + first, last", "return before + first, first"),
    Mutant("anchored: a chunk is prepared by the gates of all before", ANCHORED, "return before + first, last", "return before + first, before + last"),
    Mutant("early: a chunk after the last one", ANCHORED, "tl.minimum(i + 1, count - 1)", "(i + 1)"),
    Mutant("early: the same chunk again", ANCHORED, "tl.minimum(i + 1, count - 1)", "i"),
    Mutant("early: the last chunk never", ANCHORED, "tl.minimum(i + 1, count - 1)", "tl.minimum(i + 1, tl.maximum(count - 2, 0))"),
    Mutant("early: the walk begins with its second chunk", ANCHORED, "_prepare(q, k, g, chunk(first, step)", "_prepare(q, k, g, chunk(first + step, step)"),
    Mutant("early: the next chunk read from its other end", ANCHORED, "count - 1) * step, step)\n            b_qE", "count - 1) * step, -step)\n            b_qE"),
    Mutant("early: the first chunk read from the left", ANCHORED, "_prepare(q, k, g, chunk(first, step)", "_prepare(q, k, g, chunk(first, 1)"),
    Mutant("anchored: a token reads the state after its chunk", ANCHORED, "b_ST = operand(tl.trans(S), ACC, DOT)", "b_ST = operand(tl.trans(dot(b_vT, b_kE, S, DOT)), ACC, DOT)"),
    Mutant("anchored: forward state loses the past", ANCHORED, "S = dot(b_vT, b_kE, S, DOT)\n        b_o", "S = dot(b_vT, b_kE, 0 * S, DOT)\n        b_o"),
    Mutant("anchored: scale forgotten", ANCHORED, "b_q.to(ACC) * (exp2(b, DOT) * scale)", "b_q.to(ACC) * exp2(b, DOT)"),
    # The fast path: gradients of a chunk.
    Mutant("anchored: scale missing in the query of the gradients", ANCHORED, "q.to(ACC) * (E * scale), ACC", "q.to(ACC) * E, ACC"),
    Mutant("anchored: keys of the gradients grow where they decay", ANCHORED, "E_inverse = exp2(negative(b), DOT)", "E_inverse = exp2(b, DOT)"),
    Mutant("anchored: scores of dv through the other mask", ANCHORED, "A = tl.where(_reads(REVERSE), dot(qE", "A = tl.where(_reads(not REVERSE), dot(qE"),
    Mutant("anchored: dA not masked", ANCHORED, "dA = operand(tl.where(_reads(REVERSE), dA, 0.0), ACC, DOT)", "dA = operand(dA, ACC, DOT)"),
    Mutant("anchored: dv of the state missing", ANCHORED, "    dv = dot(kE, dST, dv, DOT)\n", ""),
    Mutant("anchored: dA transposed in dq", ANCHORED, "dqE = dot(dA, kE, zero_k, DOT)", "dqE = dot(tl.trans(dA), kE, zero_k, DOT)"),
    Mutant("anchored: dA not transposed in dk", ANCHORED, "dkE = dot(tl.trans(dA), qE, zero_k, DOT)", "dkE = dot(dA, qE, zero_k, DOT)"),
    Mutant("anchored: pairs of dg add keys", ANCHORED, "* dqE - kE", "* dqE + kE"),
    Mutant("anchored: pairs of dg without keys", ANCHORED, "qE.to(ACC) * dqE - kE.to(ACC) * dkE, DOT)", "qE.to(ACC) * dqE, DOT)"),
    Mutant("anchored: dq without the state", ANCHORED, "    dqE = dot(do, S, dqE, DOT)\n", ""),
    Mutant("anchored: dq without scale", ANCHORED, "dq = dqE * (E * scale)", "dq = dqE * E"),
    Mutant("anchored: dk without the state", ANCHORED, "dk = (dkE + writes) * E_inverse", "dk = dkE * E_inverse"),
    Mutant("anchored: dk grows where it decays", ANCHORED, "dk = (dkE + writes) * E_inverse", "dk = (dkE + writes) * E"),
    Mutant("anchored: dg without reads", ANCHORED, "qE.to(ACC) * dqE - kE.to(ACC) * dkE, DOT)", "kE.to(ACC) * -dkE, DOT)"),
    Mutant("anchored: dg reads inside the chunk only", ANCHORED, "    dqE = dot(do, S, dqE, DOT)\n    writes = dot(v, dS, zero_k, DOT)\n    dq = dqE * (E * scale)\n", "    writes = dot(v, dS, zero_k, DOT)\n    dq = dot(do, S, dqE, DOT) * (E * scale)\n"),
    Mutant("anchored: dg without writes", ANCHORED, "    dg += sums(ahead(not REVERSE, False), kE.to(ACC) * writes, DOT)  # over all tokens before t\n", ""),
    Mutant("anchored: dg without the token's own reads", ANCHORED, "ahead(REVERSE, True), qE", "ahead(REVERSE, False), qE"),
    Mutant("anchored: dg with the token's own writes", ANCHORED, "ahead(not REVERSE, False), kE", "ahead(not REVERSE, True), kE"),
    Mutant("anchored: dg reads of the wrong side", ANCHORED, "ahead(REVERSE, True), qE", "ahead(not REVERSE, True), qE"),
    Mutant("anchored: dg without <S, dS>", ANCHORED, "dg = dot(tl.full((C, S_dS.shape[0]), 1.0, ACC), S_dS, zero_k, DOT)", "dg = zero_k"),
    # The fast path: the backward pass.
    Mutant("anchored: a kept S, keys grow where they decay", ANCHORED, "load(k, at, T, K, BK).to(ACC) * exp2(negative(sums(_middle(False), b_g, DOT))", "load(k, at, T, K, BK).to(ACC) * exp2((sums(_middle(False), b_g, DOT))"),
    Mutant("anchored: a kept dS without scale", ANCHORED, "(exp2(sums(_middle(True), b_g, DOT), DOT) * scale)", "exp2(sums(_middle(True), b_g, DOT), DOT)"),
    Mutant("anchored: a kept dS with the other middle", ANCHORED, "(exp2(sums(_middle(True), b_g, DOT), DOT) * scale)", "(exp2(sums(_middle(False), b_g, DOT), DOT) * scale)"),
    Mutant("anchored: a kept dS goes on from the gates of S", ANCHORED, "dS, between, dS_before = _advance(dS, dS_before", "dS, between, dS_before = _advance(dS, S_before"),
    Mutant("anchored: S goes on from the gates of dS", ANCHORED, "S, _, S_before = _advance(S, S_before", "S, _, S_before = _advance(S, dS_before"),
    Mutant("anchored: S of the neighbouring chunk", ANCHORED, "b_S = kept(p_S, n,", "b_S = kept(p_S, tl.maximum(n - 1, 0),"),
    Mutant("anchored: dS of the neighbouring chunk", ANCHORED, "b_dS = kept(p_dS, n,", "b_dS = kept(p_dS, tl.maximum(n - 1, 0),"),
    Mutant("anchored: dA not of do and v", ANCHORED, "dA = dot(b_do, b_vT,", "dA = dot(b_v, b_doT,"),
    Mutant("anchored: v taken for do where both are loaded twice", ANCHORED, "b_doT = load(do,", "b_doT = load(v,"),
    Mutant("anchored: do taken for v where both are loaded twice", ANCHORED, "b_vT = load(v, at, T, V, BV, TRANSPOSED=True) if", "b_vT = load(do, at, T, V, BV, TRANSPOSED=True) if"),
    Mutant("anchored: dS carries v", ANCHORED, "dS = dot(b_doT, b_qE, dS, DOT)", "dS = dot(b_vT, b_qE, dS, DOT)"),
    Mutant("anchored: S again, keys grow where they decay", ANCHORED, "A, qE if REVERSE else kE", "A, qE if REVERSE else operand(k.to(ACC) * E, ACC, DOT)"),
    Mutant("anchored: scores of one scan missing in dv", ANCHORED, "            A += part_A\n            store(dg_opp", "            store(dg_opp"),
    Mutant("anchored: scores not transposed in dv", ANCHORED, "b_AT = operand(tl.trans(A), ACC, DOT)", "b_AT = operand(A, ACC, DOT)"),
    Mutant("anchored: first gate of the own scan not zero", ANCHORED, "store(dg_own, tl.where(token == (0 if step > 0 else T - 1), 0.0, b_dg)", "store(dg_own, b_dg"),
    Mutant("anchored: first gate of the opposite scan not zero", ANCHORED, "store(dg_opp, tl.where(token == (T - 1 if step > 0 else 0), 0.0, b_dg)", "store(dg_opp, b_dg"),
    Mutant("anchored: first gate of every chunk zero", ANCHORED, "store(dg_own, tl.where(token == (0 if step > 0 else T - 1), 0.0, b_dg)", "store(dg_own, tl.where(token % C == 0, 0.0, b_dg)"),
    Mutant("backward: what enters one dS enters the other", KERNELS, "dS = entering(None if HALVES and not SECOND else p_dS_enter, i_opp,", "dS = entering(None if HALVES and not SECOND else p_dS_enter, i_own,"),
    Mutant("anchored: what enters S_fwd enters S_rev", KERNELS, "S = entering(p_S_enter, i_rev, BV, BK, ACC)\n        _, lowest", "S = entering(p_S_enter, i_fwd, BV, BK, ACC)\n        _, lowest"),
    Mutant("kernels: the share of the reverse scan is lost", BLOCKS, "return load(share, at, T, V, BV).to(ACC)", "return tl.zeros((C, BV), ACC)"),
    Mutant("kernels: the reverse scan leaves its share in o, wherever it is sought", KERNELS, "q, k, v, g_rev, share, None, S, scale, end, count, -1, T, K, V, DOT, STAGES", "q, k, v, g_rev, o, None, S, scale, end, count, -1, T, K, V, DOT, STAGES"),
    Mutant("kernels: shares of all blocks of V in one place", KERNELS, "share = sequence(share, i_b, i_h, i_v * BV)\n    V -=", "share = sequence(share, i_b, i_h, 0)\n    V -="),
    Mutant("kernels: the exponents of the reverse scan are forgotten", KERNELS, "lowest = least(lowest, lowest_fwd)", "lowest = lowest_fwd"),
    # Kernels: which path.
    Mutant("kernels: the forward pass computes again above the bound", KERNELS, "        lowest = least(lowest, lowest_fwd)\n    if not _exact(", "        lowest = least(lowest, lowest_fwd)\n    if _exact("),
    Mutant("kernels: the backward pass computes again at twice the bound", KERNELS, "exact = _exact(lowest, BOUND)", "exact = _exact(lowest, 2 * BOUND)"),
    # Kernels: offsets.
    Mutant("kernels: every block of V reads the first", KERNELS, "v, o = sequence(v, i_b, i_h, i_v * BV), sequence(o, i_b, i_h, i_v * BV)\n    share = sequence(share, i_b, i_h, i_v * BV)\n    V", "v, o = sequence(v, i_b, i_h, 0), sequence(o, i_b, i_h, i_v * BV)\n    share = sequence(share, i_b, i_h, i_v * BV)\n    V"),
    Mutant("kernels: a block of V ends where V does", KERNELS, "    share = sequence(share, i_b, i_h, i_v * BV)\n    V -= i_v * BV\n", "    share = sequence(share, i_b, i_h, i_v * BV)\n"),
    Mutant("backward: parts of two batches share memory", KERNELS, "i_part = i_v * (tl.num_programs(0) // H) + i_b", "i_part = i_v + i_b"),
    Mutant("backward: every block of V writes the first dv", KERNELS, "dv = sequence(dv, i_b, i_h, i_v * BV)", "dv = sequence(dv, i_b, i_h, 0)"),
    Mutant("segments: states of a neighbour enter the forward pass", KERNELS, "i_fwd, i_rev = _places(i_block, i_s)\n    lowest", "i_fwd, i_rev = i_block * tl.num_programs(2) + i_s, (i_block + 1) * tl.num_programs(2) + i_s\n    lowest"),
    Mutant("segments: states of a neighbour enter the backward pass", KERNELS, "i_own, i_opp = _places(i_block, i_s)", "i_own, i_opp = i_block * tl.num_programs(2) + i_s, (i_block + 1) * tl.num_programs(2) + i_s"),
    Mutant("segments: every segment gets what enters the first", KERNELS, "i_fwd, i_rev = _places(i_block, i_s)\n    lowest", "i_fwd, i_rev = _places(i_block, 0)\n    lowest"),
    # Kernels: what each segment adds.
    Mutant("kernels: a last chunk that is not full is left out", KERNELS, "tl.minimum(SEGMENT // C, tl.cdiv(T, C) - start)", "tl.minimum(SEGMENT // C, T // C - start)"),
    Mutant("segments: S decays by the gates of the other direction", KERNELS, "g_along, g_against = (g_rev, g_fwd) if GRADIENT else (g_fwd, g_rev)", "g_along, g_against = (g_rev, g_fwd) if GRADIENT else (g_rev, g_fwd)"),
    Mutant("segments: S_fwd with the token's own gate", KERNELS, "carry(S_along, b_g, b_x, tl.trans(b_yT), GRADIENT, DOT)", "carry(S_along, b_g, b_x, tl.trans(b_yT), True, DOT)"),
    Mutant("segments: S_rev with the token's own gate", KERNELS, "sums(ahead(True, GRADIENT), b_g, DOT) + decay_against", "sums(ahead(True, True), b_g, DOT) + decay_against"),
    Mutant("segments: dS_fwd without the token's own gate", KERNELS, "sums(ahead(True, GRADIENT), b_g, DOT) + decay_against", "sums(ahead(True, False), b_g, DOT) + decay_against"),
    Mutant("segments: dS_rev without the token's own gate", KERNELS, "carry(S_along, b_g, b_x, tl.trans(b_yT), GRADIENT, DOT)", "carry(S_along, b_g, b_x, tl.trans(b_yT), False, DOT)"),
    Mutant("segments: dS decays by the gates of the other direction", KERNELS, "g_along, g_against = (g_rev, g_fwd) if GRADIENT else (g_fwd, g_rev)", "g_along, g_against = (g_fwd, g_rev) if GRADIENT else (g_fwd, g_rev)"),
    Mutant("segments: scale forgotten in dS_rev", KERNELS, "S_along * scale", "S_along"),
    Mutant("segments: every block of V adds the first", KERNELS, "sequence(y, i_b, i_h, i_v * BV)", "sequence(y, i_b, i_h, 0)"),
    Mutant("segments: stored in reverse order", KERNELS, "i_fwd, i_rev = _places(i_block, i_s)\n    i_along", "i_fwd, i_rev = _places(i_block, tl.num_programs(2) - 1 - i_s)\n    i_along"),
    Mutant("segments: directions share places", KERNELS, "i_fwd, i_rev = _places(i_block, i_s)\n    i_along", "i_fwd, i_rev = _places(i_block, i_s)\n    i_rev = i_fwd\n    i_along"),
    Mutant("segments: dS_fwd and dS_rev exchanged", KERNELS, "i_along, i_against = (i_rev, i_fwd) if GRADIENT", "i_along, i_against = (i_fwd, i_rev) if GRADIENT"),
    Mutant("segments: S_fwd and S_rev exchanged", KERNELS, "if GRADIENT else (i_fwd, i_rev)", "if GRADIENT else (i_rev, i_fwd)"),
    Mutant("segments: decay along the walk is lost", KERNELS, "0 * row, decay_along, mask", "0 * row, 0 * decay_along, mask"),
    Mutant("segments: only the last chunk's decay along the walk is kept", KERNELS, "decay_along += total(b_g, DOT)", "decay_along = total(b_g, DOT)"),
    Mutant("segments: decay against the walk is lost", KERNELS, "0 * row, decay_against, mask", "0 * row, 0 * decay_against, mask"),
    Mutant("segments: only the last chunk's decay against the walk is kept", KERNELS, "decay_against += total(b_g, DOT)", "decay_against = total(b_g, DOT)"),
    Mutant("segments: scale forgotten in dS_fwd", KERNELS, "S_against * scale", "S_against"),
    Mutant("segments: a walk to the left", KERNELS, "at = chunk(start + i, 1)", "at = chunk(start + count - 1 - i, -1)"),
    Mutant("segments: one direction leaves the state of the other", KERNELS, "    if g_along is not None:\n        tl.store(", "    if g_against is not None:\n        tl.store("),
    Mutant("segments: S with scale", LAUNCH, "_enter(k, v, g_fwd, g_rev, 1.0, S_enter, False, cut, options)", "_enter(k, v, g_fwd, g_rev, scale, S_enter, False, cut, options)"),
    Mutant("segments: dS of k and v", LAUNCH, "_enter(q, do, g_fwd, g_rev, scale, dS_enter, True, cut, options)", "_enter(k, v, g_fwd, g_rev, scale, dS_enter, True, cut, options)"),
    Mutant("segments: dS taken for S", LAUNCH, "_enter(q, do, g_fwd, g_rev, scale, dS_enter, True, cut, options)", "_enter(q, do, g_fwd, g_rev, scale, dS_enter, False, cut, options)"),
    Mutant("segments: what is kept is exchanged", LAUNCH, "_or_none(S_enter), _or_none(dS_enter)", "_or_none(dS_enter), _or_none(S_enter)"),
    # Kernels: what enters each segment.
    Mutant("segments: nothing decays from segment to segment", KERNELS, "tl.exp2(decay) * S + added", "S + added"),
    Mutant("segments: decay of the segment before", KERNELS, "decay = tl.load(p_total + i_segment * BK + cell % BK)", "decay = tl.load(p_total + tl.maximum(i_segment - step, 0) * BK + cell % BK)"),
    Mutant("segments: dS_rev scanned from the right", KERNELS, "i_direction == (1 if GRADIENT else 0)", "(i_direction == 0) & (not GRADIENT)"),
    Mutant("segments: dS_fwd scanned from the left", KERNELS, "i_direction == (1 if GRADIENT else 0)", "(i_direction == 0) | GRADIENT"),
    Mutant("segments: a segment enters itself", KERNELS, "        tl.store(p_enter + cell, S)\n        S = tl.exp2(decay) * S + added\n", "        S = tl.exp2(decay) * S + added\n        tl.store(p_enter + cell, S)\n"),
    Mutant("segments: stored in the order of the scan", KERNELS, "p_enter += step * BV * BK", "p_enter += BV * BK"),
    # The launcher: what is computed.
    Mutant("launch: directions swapped", LAUNCH, "return _checked(q, k, v, None if reverse else g, g if reverse else None, scale, precision)", "return _checked(q, k, v, g if reverse else None, None if reverse else g, scale, precision)"),
    Mutant("launch: mean becomes sum", LAUNCH, "return _checked(q, k, v, g_fwd, g_rev, scale / 2, precision)", "return _checked(q, k, v, g_fwd, g_rev, scale, precision)"),
    Mutant("launch: scale lost in the backward pass", LAUNCH, "_backward(q, k, v, g_fwd, g_rev, S_enter, do, ctx.scale, ctx.precision)", "_backward(q, k, v, g_fwd, g_rev, S_enter, do, 1.0, ctx.precision)"),
    Mutant("launch: gradients of the gates swapped", LAUNCH, "    dg_fwd = None if g_fwd is None else dg[0]\n    dg_rev = None if g_rev is None else dg[-1]\n    return", "    dg_fwd = None if g_fwd is None else dg[-1]\n    dg_rev = None if g_rev is None else dg[0]\n    return"),
    Mutant("launch: a scan alone leaves a share", LAUNCH, "alone = g_fwd is None or g_rev is None", "alone = False"),
    Mutant("launch: a large K is not refused", LAUNCH, "if q.shape[3] > MAX_K:", "if q.shape[3] > 2 * MAX_K:"),
    Mutant("launch: any precision is taken", LAUNCH, "if precision not in PRECISIONS:", "if False:"),
    Mutant("launch: fake gradients laid out otherwise", LAUNCH, "return [_empty(x) for x in (q, k, v, g_fwd, g_rev) if x is not None]", "return [x.new_empty(x.shape) for x in (q, k, v, g_fwd, g_rev) if x is not None]"),
    # The launcher: memory.
    Mutant("launch: blocks of V not added", LAUNCH, "grad.copy_(part.unflatten(0, (blocks, -1)).sum(0))", "grad.copy_(part.unflatten(0, (blocks, -1))[0])"),
    Mutant("launch: gradient of v told by identity", LAUNCH, "[grad if n == 2 else _parts(inputs[n], blocks)", "[grad if inputs[n] is v else _parts(inputs[n], blocks)"),
    Mutant("launch: one block of V only", LAUNCH, "sequences, blocks = B * H, _cdiv(V, tile[1])", "sequences, blocks = B * H, 1"),
    Mutant("kernels: NaN among the exponents is exact", KERNELS, "(lowest >= BOUND).to(tl.int32)) == 1", "1 - (lowest < BOUND).to(tl.int32)) == 1"),
    Mutant("kernels: segments in the order of others' tokens", KERNELS, "start, count = _chunks(i_s, T, SEGMENT)\n    end = start + count - 1\n    i_fwd", "start, count = _chunks(tl.num_programs(2) - 1 - i_s, T, SEGMENT)\n    end = start + count - 1\n    i_fwd"),
    Mutant("segments: what the chunks between forget is forgotten", KERNELS, "sums(ahead(True, GRADIENT), b_g, DOT) + decay_against", "sums(ahead(True, GRADIENT), b_g, DOT)"),
    Mutant("kept: states where the gradients of two chunks go", BLOCKS, "i_t = n * C", "i_t = n // 2 * 2 * C"),
    Mutant("kept: both rows of a token in one place", BLOCKS, "(2 * dg[1]) + row % 2 * BK + col)", "(2 * dg[1]) + col)"),
    Mutant("kept: a token's rows far apart", BLOCKS, "token = i_t + row % (2 * C) // 2", "token = i_t + row % C"),
    Mutant("kept: both rows of a token in one place of dv", BLOCKS, "p_x = x_0[0] + (token * x_0[1] + row % 2 * BK + col)", "p_x = x_0[0] + (token * x_0[1] + col)"),
    Mutant("kept: dk's rows in dq", BLOCKS, "x_0[0], x_1[0])", "x_0[0], x_0[0])"),
    Mutant("kept: rows behind the last token", BLOCKS, "return p, (token < T) & (col < BK)", "return p, (row < BV) & (col < BK)"),
    Mutant("kept: S and dS in one gate's memory", ANCHORED, "keep(dS, p_dS, n, dg_opp, dq, dk,", "keep(dS, p_dS, n, dg_own, dq, dk,"),
    Mutant("kept: halving reads another gate's memory", HALVING, "b_S = kept(p_S, n, dg_opp,", "b_S = kept(p_S, n, dg_own,"),
    Mutant("launch: states where the gradients of fewer features go", LAUNCH, "if full and options", "if options"),
    Mutant("launch: states where gradients in half precision go", LAUNCH, "and all(dg.dtype == torch.float32 for dg in grads[3:])", ""),
    Mutant("launch: unrounded states where gradients go", LAUNCH, 'if full and options["DOT"] == "bf16" and', "if full and"),
    Mutant("launch: both states in one memory", LAUNCH, "states = [_or_none(_states(v, parts, cut, options)) for _ in range(2)]", "states = [_or_none(_states(v, parts, cut, options))] * 2"),
    Mutant("launch: memory for the states of one segment", LAUNCH, "sequences * blocks, _cdiv(T, CHUNK), BV", "sequences * blocks, _cdiv(min(T, SEGMENT), CHUNK), BV"),
    Mutant("launch: memory for the states of as many chunks in each half", LAUNCH, "sequences * blocks, _cdiv(T, CHUNK), BV", "sequences * blocks, _cdiv(T, 2 * CHUNK) * 2, BV"),
    Mutant("launch: memory for the states of one block of V", LAUNCH, "sequences * blocks, _cdiv(T, CHUNK), BV", "sequences, _cdiv(T, CHUNK), BV"),
    Mutant("launch: a share in half precision", LAUNCH, "o.dtype == _rounded(o, options) and ", ""),
    Mutant("launch: a share in lines of other heads", LAUNCH, "o.shape[3] * o.element_size() >= LINE", "o.shape[3]"),
    Mutant("launch: scratch memory for a share that nobody writes", LAUNCH, "if alone or (", "if ("),
    Mutant("launch: gradient read as if contiguous", LAUNCH, "*(_strided(x) for x in (q, k, v, g_fwd, g_rev, do)),\n                dq", "*(_strided(x) for x in (q, k, v, g_fwd, g_rev)), (do, *do.contiguous().stride()),\n                dq"),
    Mutant("launch: gradient dtype of another tensor", LAUNCH, "grads = [_empty(x) for x in inputs]", "grads = [_empty(x).to(q.dtype) for x in inputs]"),
    Mutant("launch: K and V exchanged", LAUNCH, "(H, T, K, V, tokens))", "(H, T, V, K, tokens))"),
    # The launcher: constants.
    Mutant("kernels: float64 clamped like float32", BLOCKS, "2000.0 if tl.float64 == ACC else 300.0", "300.0"),
    Mutant("launch: float64 added up in float32", LAUNCH, "kernels.tl.float64 if double else kernels.tl.float32", "kernels.tl.float32"),
    Mutant("halving: stops one level early", HALVING, "LEVELS = tl.constexpr(4)", "LEVELS = tl.constexpr(3)"),
    Mutant("launch: a tile too narrow for K", LAUNCH, "BK >= K and (BV >= V or BK == MAX_K)", "BV >= V or BK == MAX_K"),
    Mutant("launch: the fast path goes on where it overflows", LAUNCH, "\nBOUND = -40.0", "\nBOUND = -200.0"),
    Mutant("launch: gradients cancel below the roundoff", LAUNCH, '"ieee": -2.0}', '"ieee": -60.0}'),
    Mutant("launch: the backward pass has the forward one's bound", LAUNCH, "\"BOUND\": BOUND_BACKWARD[options[\"DOT\"]]", "\"BOUND\": BOUND"),
    # The launcher: segments.
    Mutant("launch: two segments do not enter each other", LAUNCH, "if cut.halves or v.shape[2] <= SEGMENT:", "if cut.halves or v.shape[2] <= 2 * SEGMENT:"),
    Mutant("launch: states of a part of V enter", LAUNCH, "BV * BK // kernels.CELLS.value]", "BV * BK // kernels.CELLS.value // 2]"),
    Mutant("launch: half a chunk in a segment", LAUNCH, "_cdiv(T, CHUNK) * CHUNK", "_cdiv(T, CHUNK // 2) * (CHUNK // 2)"),
    Mutant("launch: segments counted as if any number were allowed", LAUNCH, "    if T <= SEGMENT * MAX_SEGMENTS:\n        return _cdiv(T, SEGMENT)\n    return _cdiv(T, _segment(T))", "    return _cdiv(T, SEGMENT)"),
    Mutant("launch: segments counted as torch.export cannot", LAUNCH, "    if T <= SEGMENT * MAX_SEGMENTS:\n        return _cdiv(T, SEGMENT)\n    return _cdiv", "    return _cdiv"),
    Mutant("launch: half a chunk in one of several segments", LAUNCH, "segments * CHUNK) * CHUNK", "segments * (CHUNK // 2)) * (CHUNK // 2)"),
    Mutant("launch: halves are not programs", LAUNCH, "math.prod(grid) <= 4 * MANY", "grid[0] <= 4 * MANY"),
    Mutant("launch: a program too many is not few", LAUNCH, "math.prod(grid) <= 4 * MANY", "math.prod(grid) < 4 * MANY"),
    Mutant("launch: the last segment takes what is left", LAUNCH, "_cdiv(T, segments * CHUNK) * CHUNK", "max(SEGMENT, _cdiv(T, segments * CHUNK) * CHUNK)"),
    Mutant("launch: any number of segments", LAUNCH, "min(_cdiv(T, SEGMENT), MAX_SEGMENTS)", "_cdiv(T, SEGMENT)"),
    # Found by readers who planted bugs of their own, and had survived: several images, heads, segments and blocks of V at once.
    Mutant("forward: entering states counted block by block", KERNELS, "i_fwd, i_rev = _places(i_block, i_s)\n    lowest", "i_fwd, i_rev = _places(i_v * tl.num_programs(0) + i_b * H + i_h, i_s)\n    lowest"),
    Mutant("backward: entering states of the first image", KERNELS, "i_own, i_opp = _places(i_block, i_s)", "i_own, i_opp = _places(i_h * tl.num_programs(1) + i_v, i_s)"),
    Mutant("launch: no scratch memory for the states of a part of a chunk", LAUNCH, "sequences * blocks, _cdiv(T, CHUNK), BV", "sequences * blocks, max(T // CHUNK, 1), BV"),
    Mutant("launch: 33 bits taken for 32", LAUNCH, ">= 2**30 for x", ">= 2**31 for x"),
    Mutant("launch: gates may lie farther than values", LAUNCH, "_far(q, k, v, g_fwd, g_rev, o)", "_far(q, k, v, o)"),
    Mutant("launch: entering states in the dtype of v", LAUNCH, "2, segments, BV, BK, dtype=_wide(v))", "2, segments, BV, BK)"),
    Mutant("launch: no room for large inputs", LAUNCH, "\nBOUND = -40.0", "\nBOUND = -80.0"),
    Mutant("launch: parts of gradients in half precision", LAUNCH, "T, D, dtype=_wide(x))", "T, D)"),
    Mutant("kernels: blocks of V counted in 32 bits", KERNELS, "tl.program_id(1).to(tl.int64), tl.program_id(2)", "tl.program_id(1), tl.program_id(2)"),
    Mutant("launch: decays across segments in float32", LAUNCH, "return enter.new_empty(*enter.shape[:3], enter.shape[4])", "return enter.new_empty(*enter.shape[:3], enter.shape[4], dtype=torch.float32)"),
    Mutant("segments: at most 64 are combined", KERNELS, "in tl.range(SEGMENTS, num_stages", "in tl.range(tl.minimum(SEGMENTS, 64), num_stages"),
    Mutant("segments: every head decays as the first", KERNELS, "tl.load(p_total + i_segment * BK + cell % BK)", "tl.load(p_total + (i_segment - i_block * 2 * SEGMENTS) * BK + cell % BK)"),
    Mutant("launch: no segment is longer than the usual", LAUNCH, "else (_segments(T), _segment(T))", "else (_segments(T), min(_segment(T), SEGMENT))"),
    Mutant("kernels: shares of all heads in one place", KERNELS, "share = sequence(share, i_b, i_h, i_v * BV)\n    V -=", "share = sequence(share, i_b, 0, i_v * BV)\n    V -="),
    Mutant("kernels: states of all heads in one place", KERNELS, "i_state = i_block * tl.cdiv(T, C)", "i_state = i_v * tl.cdiv(T, C)"),
    Mutant("kernels: a sequence's last state in the place of the next one's first", KERNELS, "i_state = i_block * tl.cdiv(T, C)", "i_state = i_block * (T // C)"),
    Mutant("segments: all channels decay as the first", KERNELS, "p_total + i_segment * BK + cell % BK", "p_total + i_segment * BK"),
    Mutant("launch: fake states of one segment", LAUNCH, "return _empty(v), _entering(v, _cut(q, v, g_fwd, g_rev))", "return _empty(v), _entering(v, _cut(q, v[:, :, :SEGMENT], g_fwd, g_rev))"),
    # Halves: two programs walk towards each other.
    Mutant("blocks: a chunk begins at its left, whichever way the walk goes", BLOCKS, "return n * C + (C - 1) * (1 - step) // 2, step", "return n * C, step"),
    Mutant("blocks: tokens are read to the right, whichever way the walk goes", BLOCKS, "return at[0] + tl.arange(0, C) * at[1]", "return at[0] + tl.arange(0, C)"),
    Mutant("blocks: o is stored to the right, whichever way the walk goes", BLOCKS, "tl.arange(0, C // 2)[None, :, None]) * at[1]", "tl.arange(0, C // 2)[None, :, None])"),
    Mutant("anchored: a state leaves before the last half chunk", ANCHORED, "return scale_columns(S, exp2(before, DOT)), least", "return S, least"),
    Mutant("anchored: S leaves before the last half chunk", ANCHORED, "    S = scale_columns(S, exp2(S_before, DOT))\n", ""),
    Mutant("anchored: dS leaves before the last half chunk", ANCHORED, "    dS = scale_columns(dS, exp2(dS_before, DOT))\n", ""),
    Mutant("anchored: the last half chunk of a first walk is not looked at", ANCHORED, "return S, dS, least(lowest, least(S_before, dS_before))", "return S, dS, lowest"),
    Mutant("kernels: walks begin at the left", KERNELS, "return start if step > 0 else start + count - 1", "return start"),
    Mutant("halves: all programs have the forward gate", KERNELS, "own, opp = tl.where(right, fwd[0], rev[0]), tl.where(right, rev[0], fwd[0])", "own, opp = fwd[0], rev[0]"),
    Mutant("halves: all gates have the forward one's stride of tokens", KERNELS, "own_t, opp_t = tl.where(right, fwd[1], rev[1]), tl.where(right, rev[1], fwd[1])", "own_t, opp_t = fwd[1], fwd[1]"),
    Mutant("halves: all gates have the forward one's stride of features", KERNELS, "(own, own_t, tl.where(right, fwd[2], rev[2])), (opp, opp_t, tl.where(right, rev[2], fwd[2]))", "(own, own_t, fwd[2]), (opp, opp_t, fwd[2])"),
    Mutant("halves: every program stays in its own half", KERNELS, "_chunks(1 - i_direction if SECOND else i_direction,", "_chunks(i_direction,"),
    Mutant("halves: a state is lost in the middle", KERNELS, "o, share, tl.load(p_S), scale, first, count, step, T, K, V, DOT, STAGES", "o, share, S, scale, first, count, step, T, K, V, DOT, STAGES"),
    Mutant("halves: a state is lost where the second half is computed again", KERNELS, "o, share, tl.load(p_S), scale, first, count, step, T, K, V, DOT)", "o, share, S, scale, first, count, step, T, K, V, DOT)"),
    Mutant("halves: states of neighbours meet", KERNELS, "scratch(p_S_meet, i_block * 2 + i_direction", "scratch(p_S_meet, i_block + i_direction"),
    Mutant("halves: the fast path's state goes on", KERNELS, "            S_end = forward_halving(", "            forward_halving("),
    Mutant("halves: the first half is never computed again", KERNELS, "        if not _exact(lowest, BOUND):\n            tl.debug_barrier()\n            S_end", "        if False:\n            tl.debug_barrier()\n            S_end"),
    Mutant("halves: the second half is never computed again", KERNELS, "if not _exact(lowest, BOUND):\n            # The other", "if False:\n            # The other"),
    Mutant("halves: the opposite scan computes again from the middle", KERNELS, "opposite = _first(start, count, -step)", "opposite = _first(start, count, step)"),
    Mutant("halves: the opposite scan computes again with its own gate", KERNELS, "q, k, v, g_opp, share, None, S, scale, opposite", "q, k, v, g, share, None, S, scale, opposite"),
    Mutant("halves: backward, every program stays in its own half", KERNELS, "i_s = 1 - i_s if SECOND else i_s\n", ""),
    Mutant("halves: backward, states of neighbours meet", KERNELS, "i_own = i_block * 2 + i_s  #", "i_own = i_block + i_s  #"),
    Mutant("halves: backward, gradients of the gates swapped", KERNELS, "_own(dg_fwd, dg_rev, step, True)", "_own(dg_rev, dg_fwd, step, True)"),
    Mutant("halves: backward, S enters from memory that nobody wrote", KERNELS, "S = entering(None if HALVES and not SECOND else p_S_enter, i_own", "S = entering(p_S_enter, i_own"),
    Mutant("halves: backward, dS enters from memory that nobody wrote", KERNELS, "dS = entering(None if HALVES and not SECOND else p_dS_enter, i_opp", "dS = entering(p_dS_enter, i_opp"),
    Mutant("halves: backward, the fast path's states go on", KERNELS, "            S_end, dS_end = states_halving(", "            _, _ = states_halving("),
    Mutant("halves: backward, S goes on as dS", KERNELS, "tl.store(scratch(p_dS_enter, i_opp, BV, BK), dS_end)", "tl.store(scratch(p_dS_enter, i_opp, BV, BK), S_end)"),
    Mutant("backward: the first segment decides for all", KERNELS, "p_exact += i_block * tl.num_programs(2) + i_s", "p_exact += i_block * tl.num_programs(2)"),
    Mutant("backward: the second walk always takes the fast path", KERNELS, "tl.store(p_exact, exact.to(tl.int32))", "tl.store(p_exact, 1)"),
    Mutant("backward: the second walk takes the other path", KERNELS, "elif tl.load(p_exact) != 0:", "elif tl.load(p_exact) == 0:"),
    Mutant("launch: gates taken for dense", LAUNCH, "return all(g is None or g.stride(3) == 1", "return any(g is None or g.stride(3) == 1"),
    Mutant("launch: blocks of V do not count as many", LAUNCH, "sequences * blocks >= MANY", "sequences >= MANY"),
    Mutant("launch: halves of gates of two dtypes", LAUNCH, " and g_fwd.dtype == g_rev.dtype", ""),
    Mutant("launch: short halves wait for long ones", LAUNCH, "if 4 * (places - long) >= long else 1", "if 5 * (places - long) >= long else 1"),
    Mutant("launch: the long half is too short by a chunk", LAUNCH, "_cdiv(rounds * T, (rounds + 1) * CHUNK) * CHUNK", "rounds * T // ((rounds + 1) * CHUNK) * CHUNK"),
    Mutant("launch: halves are even", LAUNCH, "    if cut.halves:\n        cut = _meet_backward(", "    if False:\n        cut = _meet_backward("),
    Mutant("launch: a program has one warp", LAUNCH, '_at_once(q, options["num_warps"])', "_at_once(q, 1)"),
    Mutant("launch: a multiprocessor holds sixteen warps of 255 registers", LAUNCH, "multiprocessors * 8 // warps", "multiprocessors * 16 // warps"),
    Mutant("launch: blocks of V need no places", LAUNCH, "long = cut.grid[0] * cut.grid[1]", "long = cut.grid[0]"),
    Mutant("halves: backward, the short ones first", KERNELS, "SECOND if HALVES else not SECOND)", "not SECOND)"),
    Mutant("launch: the first half is the shorter one", LAUNCH, "_cdiv(T, 2 * CHUNK) * CHUNK) if halves", "T // (2 * CHUNK) * CHUNK) if halves"),
    Mutant("launch: sizes of heads are asked for in vain", LAUNCH, "    if v.shape[2] <= SEGMENT:  # any K", "    if v.shape[2] < 0:  # any K"),
    Mutant("launch: short sequences are halved", LAUNCH, "halves = both and T > SEGMENT and", "halves = both and"),
    Mutant("launch: directions meet in one place", LAUNCH, "v.new_empty(sequences * blocks, 2, BV, BK, ", "v.new_empty(sequences * blocks, 1, BV, BK, "),
    Mutant("launch: states meet in the dtype of v", LAUNCH, "2, BV, BK, dtype=_wide(v))", "2, BV, BK)"),
    Mutant("launch: S and dS meet in one place", LAUNCH, "enter = [_meeting(v, cut) for _ in range(2)] if cut.halves", "enter = [_meeting(v, cut)] * 2 if cut.halves"),
    # The parts of a block that are one kernel each, and when the model takes them.
    Mutant("parts: rows behind the end are read", PARTS, "(i < rows) & (j < cols)", "(i <= rows) & (j < cols)"),
    Mutant("parts: columns behind the end are read", PARTS, "(i < rows) & (j < cols)", "(i < rows) & (j <= cols)"),
    Mutant("parts: gates in base 2", PARTS, "(LN2 / TAU)", "(1 / TAU)"),
    Mutant("parts: gates without a temperature", PARTS, "(LN2 / TAU)", "LN2"),
    Mutant("parts: gates overflow", PARTS, "(tl.minimum(z, 0) - log2(1 + tl.exp2(-tl.abs(z)), FAST))", "-log2(1 + tl.exp2(-z), FAST)"),
    Mutant("parts: gates without a bias", PARTS, "z = (z + load(b, 0, col, 1, N, 1, BN, tl.float32)) * LOG2E", "z = z * LOG2E"),
    Mutant("parts: the gradient of gates by sigmoid(z)", PARTS, "torch.sigmoid(-z)", "torch.sigmoid(z)"),
    Mutant("parts: gates differentiated without a bias", PARTS, "F.linear(low, W_2, b).float()", "F.linear(low, W_2).float()"),
    Mutant("parts: up is gate", PARTS, "load(W + N * D, col, d", "load(W, col, d"),
    Mutant("parts: gate and up swapped", PARTS, "tl.exp2(gate * -LOG2E), FAST), row", "tl.exp2(up * -LOG2E), FAST), row"),
    Mutant("parts: SiLU differentiated as a sigmoid times x", PARTS, "s * (1 + gate * (1 - s))", "s * (1 - gate * (1 - s))"),
    Mutant("parts: gradients of gate and up swapped", PARTS, "tl.store(p + N, (b_dh * gate * s)", "tl.store(p + N, (b_dh * up * s)"),
    Mutant("parts: the gradient of gate runs into that of up", PARTS, "    there = there & (col + tl.arange(0, BN) < N)[None, :]\n", ""),
    Mutant("parts: hidden channels of the first block", PARTS, "col = tl.program_id(0) % tl.cdiv(N, BN) * BN\n    gate, up = gate_and_up(x, W, row, col, M, D, N, BM, BN, BD, DOT)\n    store", "col = 0\n    gate, up = gate_and_up(x, W, row, col, M, D, N, BM, BN, BD, DOT)\n    store"),
    Mutant("parts: a norm divides by the block", PARTS, "keep_dims=True) / V + eps)", "keep_dims=True) / x.shape[1] + eps)"),
    Mutant("parts: both norms with one eps", PARTS, "b_near, _ = normed(load(near, row, 0, M, V, BM, BV, tl.float32), V, eps_near)", "b_near, _ = normed(load(near, row, 0, M, V, BM, BV, tl.float32), V, eps_far)"),
    Mutant("parts: the gate weighs the local branch", PARTS, "gate * b_far + (1 - gate) * b_near", "gate * b_near + (1 - gate) * b_far"),
    Mutant("parts: no SiLU", PARTS, "        b_y *= sigmoid(b_y, FAST)\n", "        b_y *= 1\n"),
    Mutant("parts: a norm's gradient without its mean", PARTS, "r * (dy - y * (tl.sum(dy * y, 1, keep_dims=True) / V))", "r * dy"),
    Mutant("parts: SiLU not differentiated", PARTS, "        b_dy *= s * (1 + b_y * (1 - s))\n", "        b_dy *= s\n"),
    Mutant("parts: the gradient of the gate forgets the local branch", PARTS, "difference = b_far * b_w_far - b_near * b_w_near", "difference = b_far * b_w_far + 0 * b_near"),
    Mutant("parts: weights of a norm in its gradient twice", PARTS, "tl.sum(b_dfar * b_far, 0", "tl.sum(b_dfar * b_w_far * b_far, 0"),
    Mutant("parts: gradients of weights swapped", PARTS, "dw_far, dw_near = dw.sum(0)", "dw_near, dw_far = dw.sum(0)"),
    Mutant("parts: gates in the dtype of tokens", PARTS, "g = _empty(x, (*x.shape[:-1], len(W_2)), torch.float32)", "g = _empty(x, (*x.shape[:-1], len(W_2)), x.dtype)"),
    Mutant("parts: strides ignored", PARTS, "x.contiguous(), W.contiguous(), h,", "x, W, h,"),
    Mutant("model: hooks ignored", MODEL, "and not any(hooks) ", ""),
    Mutant("model: substitutes ignored", MODEL, "type(module) is kind", "isinstance(module, kind)"),
    Mutant("model: every dtype in one kernel", MODEL, "product_dtype(x) not in (torch.bfloat16, torch.float16) or forward", "forward"),
    Mutant("model: every backend in one kernel", MODEL, 'or resolve_backend(backend, x.device) != "fused"', ""),
    Mutant("model: another forward ignored", MODEL, ' and "forward" not in vars(module)', ""),
    Mutant("model: a bias ignored", MODEL, " and tuple(own) == parameters", ""),
    Mutant("model: sparse weights taken for dense ones", MODEL, "p.layout == torch.strided and ", ""),
    Mutant("model: hooks of all modules ignored", MODEL, "_has_any_global_hook() or ", ""),
    Mutant("model: tangents are zero", MODEL, " or forward_ad._current_level >= 0", ""),
    Mutant("launch: tangents are zero", LAUNCH, "forward_ad._current_level >= 0 and any", "False and any"),
    Mutant("parts: weights of another dtype converted", PARTS, "each.dtype != x.dtype and not autocast", "False"),
    Mutant("parts: float64 computed in autocast's dtype", "vig_ref/ops.py", " and x.dtype != torch.float64\n", "\n"),
    Mutant("parts: a temperature of 16", PARTS, "torch.sigmoid(-z) / tau", "torch.sigmoid(-z) / 16"),
    Mutant("model: one eps for both norms", MODEL, "far.eps, near.eps, self.silu", "far.eps, far.eps, self.silu"),
]  # fmt: skip


def mutate(mutant: Mutant, root: Path) -> None:
    """Plant the bug in the copy of the project at `root`."""
    path = root / mutant.path
    source = path.read_text()
    if (found := source.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.name}: expected its anchor once in {mutant.path}, found it {found} times; update it")
    path.write_text(source.replace(mutant.old, mutant.new))


def run(mutant: Mutant | None, tests: list[str], thorough: bool) -> dict[str, str]:
    """Plant one bug (or none) in a copy of the project and run the tests there: method by method, what failed first.

    Unless `thorough`, the run stops at the first failure.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("vig_ref", "tests", "pyproject.toml"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, root / name)
        if mutant:
            mutate(mutant, root)
        failures = failed_tests(root, tests, thorough, UNTOUCHED.get(mutant.layer) if mutant else None)
    return {METHODS[test.split("::")[0]]: test for test in reversed(failures)}


def failed_tests(root: Path, tests: list[str], thorough: bool, untouched: str | None) -> list[str]:
    """Those of `tests` (files, or parts of them) that fail in the project at `root`, at most one of each file."""
    command = [sys.executable, "-m", "pytest", *tests, "-v", "--one-failure-a-file" if thorough else "-x"]
    command += ["-k", f"not ({untouched})"] if untouched else []
    command += ["--hypothesis-profile", "mutants", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # kernels are interpreted, on any machine
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return [f"{tests[0]}::time limit"]
    lines = [line for line in done.stdout.splitlines() if line.startswith("tests/") and "::" in line]
    failures = [re.split(" (?:FAILED|ERROR) ", line)[0] for line in lines if re.search(" (?:FAILED|ERROR) ", line)]
    if done.returncode < 0 or (done.returncode != 0 and not failures):  # the process died, or nothing could be collected
        last = re.split(" (?:PASSED|SKIPPED) ", lines[-1])[0].strip() if lines else f"{tests[0]}::not importable"
        failures.append(f"{last} (crash)")
    return failures


def examined(mutant: Mutant, tests: list[str], thorough: bool) -> dict:
    """The mutant's record: `killed_by`, the methods that saw it, and for each of them the first test that failed."""
    start = time.monotonic()
    first = run(mutant, tests, thorough)
    record = mutant._asdict() | {"layer": mutant.layer, "killed_by": list(first), "tests": first}
    return record | {"seconds": round(time.monotonic() - start, 1)}


def as_expected(record: dict) -> bool:
    """Killed, or argued to be no bug and not killed."""
    return bool(record["killed_by"]) == (record["equivalent_because"] is None)


def table(record: dict) -> str:
    """The record as Markdown: a row for each mutant, a column for each method, a cross where it saw the bug.

    Of a record without --every-method, the one cross is the cheapest method's that sees it.
    """
    names = [name for name in METHODS.values() if any(name in m["killed_by"] for m in record["mutants"])]
    lines = ["| planted bug | " + " | ".join(names) + " |", "|---|" + ":-:|" * len(names)]
    for mutant in record["mutants"]:
        crosses = " | ".join("x" if name in mutant["killed_by"] else "" for name in names)
        lines.append(f"| {mutant['name']} | {crosses} |")
    seen = [sum(name in m["killed_by"] for m in record["mutants"]) for name in names]
    return "\n".join([*lines, f"| **seen, of {len(record['mutants'])}** | " + " | ".join(map(str, seen)) + " |"])


def circumstances() -> dict:
    """Date, command and versions; not by vig_ref.machine, since vig_ref need not be installed here."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "triton", "numpy", "hypothesis", "pytest"):
        versions[name] = importlib.metadata.version(name)
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"date": date, "command": shlex.join(["python", *sys.argv]), "versions": versions, "methods": METHODS}


def finished(path: Path | None) -> dict[str, dict]:
    """The records of a run that was cut short, of mutants that are still the same and were seen: code around an edit
    that changed nothing may have changed."""
    if not path or not path.exists():
        return {}
    known = {m.name: m._asdict() for m in MUTANTS}
    records = {m["name"]: m for m in json.loads(path.read_text())["mutants"]}
    return {
        name: m for name, m in records.items() if m["killed_by"] and name in known and known[name].items() <= m.items()
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", metavar="WORD", help="mutants whose name contains one of these words")
    parser.add_argument("--report", type=Path, metavar="JSON", help="write the record")
    parser.add_argument("--every-method", action="store_true", help="go on after the first failure, file by file")
    parser.add_argument("--resume", action="store_true", help="keep what the file of --report has, and run the rest")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print a record as a Markdown table, and run nothing")
    parser.add_argument("--tests", nargs="+", default=[*METHODS], metavar="FILE", help="run these only, or parts of them")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time (default: %(default)s)")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return 0
    chosen = [m for m in MUTANTS if not args.only or any(word in m.name for word in args.only)]
    records = finished(args.report) if args.resume else {}
    todo = [m for m in chosen if m.name not in records]

    def write(results: list[dict]):
        args.report.parent.mkdir(parents=True, exist_ok=True)
        args.report.write_text(json.dumps(circumstances() | {"mutants": results}, indent=1) + "\n")

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        healthy = pool.submit(run, None, args.tests, True)
        futures = {pool.submit(examined, mutant, args.tests, args.every_method): mutant for mutant in todo}
        for future in tqdm(concurrent.futures.as_completed(futures), total=len(futures), unit="mutant"):
            records[futures[future].name] = record = future.result()
            first = next(iter(record["tests"].values()), "SURVIVED")
            tqdm.write(f"{record['seconds']:6.1f} s  {record['name']:55} {first}")
            if args.report:
                write([records[m.name] for m in MUTANTS if m.name in records])
        if failures := healthy.result():
            print("Without any bug the tests fail, so that nothing above means anything:", *failures.values(), sep="\n  ")
            return 2
    results = [records[m.name] for m in chosen]
    unexpected = [r["name"] for r in results if not as_expected(r)]
    print(f"{len(results)} mutants, {len(results) - len(unexpected)} as expected", *unexpected, sep="\n  ")
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main())
