"""Planted bugs: would the tests know if a layer were wrong?

Each mutant is one small edit of the package's source. The command copies the project, applies the edit, runs the tests
that need no GPU, and notes which of them fail. A mutant that nothing kills is a hole in the tests, unless the edit does
not change the function; then `equivalent_because` argues it, and the run shows that all tests pass.

    python tests/mutants.py                                        all of them, a line each
    python tests/mutants.py --only carry halving                   those whose name contains a word
    python tests/mutants.py --report docs/results/mutation.json    and write the record
    python tests/mutants.py --table docs/results/mutation.json     print the record as a table, method by method

An anchor that is not found exactly once in its file is an error: the list follows the source.
"""

import argparse
import concurrent.futures
import json
import os
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
    "tests/test_layers.py": "oracle and bound",
    "tests/test_laws.py": "laws",
    "tests/test_fused.py": "memory and registration",
    "tests/test_adversarial.py": "adversarial cases",
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
KERNELS = "vig_ref/fused/kernels.py"
LAUNCH = "vig_ref/fused/launch.py"

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
    # Kernels: memory.
    Mutant("kernels: no mask at the end of the sequence", KERNELS, "(rows < T)[:, None] & (cols < D)[None, :]", "(rows < T + 1)[:, None] & (cols < D)[None, :]"),
    Mutant("kernels: no mask at the last feature", KERNELS, "(rows < T)[:, None] & (cols < D)[None, :]", "(rows < T)[:, None] & (cols < D + 1)[None, :]"),
    Mutant("kernels: one token too few", KERNELS, "(rows < T)[:, None] & (cols < D)[None, :]", "(rows < T - 1)[:, None] & (cols < D)[None, :]"),
    Mutant("kernels: strides of token and feature swapped", KERNELS, "rows[:, None] * stride_t + cols[None, :] * stride_d", "rows[:, None] * stride_d + cols[None, :] * stride_t"),
    Mutant("kernels: feature stride taken as 1", KERNELS, "cols[None, :] * stride_d, (rows", "cols[None, :], (rows"),
    Mutant("kernels: batch stride for heads", KERNELS, "i_b * stride_b + i_h * stride_h", "i_b * stride_b + i_h * stride_b"),
    Mutant("kernels: padding is one", KERNELS, "mask=mask, other=0.0)", "mask=mask, other=1.0)"),
    Mutant("kernels: states of neighbours overlap", KERNELS, "p_states + i * BK * BV +", "p_states + i * BK +"),
    Mutant("kernels: clamp far too early", KERNELS, "* LOG2E, -LIMIT, propagate_nan", "* LOG2E, -LIMIT / 100, propagate_nan"),
    Mutant("kernels: no clamp", KERNELS, "tl.maximum(_load(g, i_t, T, K, C, BK, ACC) * LOG2E, -LIMIT, propagate_nan=tl.PropagateNan.ALL)", "_load(g, i_t, T, K, C, BK, ACC) * LOG2E"),
    Mutant("kernels: natural gates taken as base 2", KERNELS, "_load(g, i_t, T, K, C, BK, ACC) * LOG2E", "_load(g, i_t, T, K, C, BK, ACC)"),
    Mutant("kernels: log2(e) off in the fourth digit", KERNELS, "1.4426950408889634", "1.4427950408889634"),
    # Kernels: sums of gates.
    Mutant("kernels: inclusive sum becomes exclusive", KERNELS, "return t >= i if REVERSE else t <= i", "return t > i if REVERSE else t < i"),
    Mutant("kernels: inclusive sum of the wrong side", KERNELS, "return t >= i if REVERSE else t <= i", "return t <= i if REVERSE else t >= i"),
    Mutant("kernels: halving forward, late half exclusive", KERNELS, "M = (right & (middle <= t) & (t <= i)) |", "M = (right & (middle <= t) & (t < i)) |"),
    Mutant("kernels: halving forward, early half inclusive", KERNELS, "(~right & (i < t) & (t < middle))\n        late = right", "(~right & (i <= t) & (t < middle))\n        late = right"),
    Mutant("kernels: halving reverse, late half exclusive", KERNELS, "(~right & (i <= t) & (t < middle))\n        late = ~right", "(~right & (i < t) & (t < middle))\n        late = ~right"),
    Mutant("kernels: halving reverse, early half inclusive", KERNELS, "M = (right & (middle <= t) & (t < i)) |", "M = (right & (middle <= t) & (t <= i)) |"),
    Mutant("kernels: halving reads across blocks", KERNELS, "return M, late, block == t // (2 * half)", "return M, late, block >= t // (2 * half)"),
    Mutant("kernels: middle off by one", KERNELS, "middle = block * (2 * half) + half", "middle = block * (2 * half) + half + 1"),
    Mutant("kernels: sums lose precision", KERNELS, 'return tl.dot(M.to(ACC), g, input_precision="ieee", out_dtype=ACC)', 'return tl.dot(M.to(ACC), g.to(tl.float16).to(ACC), input_precision="ieee", out_dtype=ACC)'),
    # Kernels: states and scores.
    Mutant("kernels: state never decays", KERNELS, "return tl.exp2(tl.sum(g, 0))[:, None] * S +", "return S +"),
    Mutant("kernels: state loses the past", KERNELS, "return tl.exp2(tl.sum(g, 0))[:, None] * S +", "return 0 * S +"),
    Mutant("kernels: key without decay to the edge", KERNELS, "return _carry(S, g, k * tl.exp2(_sums(~_met(C, REVERSE), g, ACC)), v, ACC, DOT)", "return _carry(S, g, k, v, ACC, DOT)"),
    Mutant("kernels: key decays with its own gate too", KERNELS, "k * tl.exp2(_sums(~_met(C, REVERSE), g, ACC)), v", "k * tl.exp2(_sums(_met(C, not REVERSE), g, ACC)), v"),
    Mutant("kernels: scores keep the wrong half", KERNELS, "_dot(tl.where(late, q * E, 0.0), tl.trans(tl.where(late, 0.0, k * E)), ACC, DOT)", "_dot(tl.where(late, 0.0, q * E), tl.trans(tl.where(late, k * E, 0.0)), ACC, DOT)"),
    Mutant("kernels: scores without blocks", KERNELS, "A += tl.where(same, _dot(tl.where(late, q * E, 0.0), tl.trans(tl.where(late, 0.0, k * E)), ACC, DOT), 0.0)", "A += _dot(tl.where(late, q * E, 0.0), tl.trans(tl.where(late, 0.0, k * E)), ACC, DOT)"),
    # Kernels: the forward pass.
    Mutant("forward: token counted once in two directions", KERNELS, "b_o = (FWD + REV) * tl.sum", "b_o = tl.sum"),
    Mutant("forward: S_rev stored after its chunk", KERNELS, "            tl.store(_edge(p_S_rev, i_state + n, BK, BV), S_rev)\n            b_k = _load(k, n * C, T, K, C, BK, ACC)\n            b_v = _load(v, n * C, T, V, C, BV, ACC)\n            b_g = _load_gate(g_rev, n * C, T, K, C, BK, ACC, LIMIT)\n            S_rev = _next_state(S_rev, b_k, b_v, b_g, True, C, ACC, DOT)\n        tl.debug", "            b_k = _load(k, n * C, T, K, C, BK, ACC)\n            b_v = _load(v, n * C, T, V, C, BV, ACC)\n            b_g = _load_gate(g_rev, n * C, T, K, C, BK, ACC, LIMIT)\n            S_rev = _next_state(S_rev, b_k, b_v, b_g, True, C, ACC, DOT)\n            tl.store(_edge(p_S_rev, i_state + n, BK, BV), S_rev)\n        tl.debug"),
    Mutant("forward: scores of the reverse scan missing", KERNELS, "            A += _scores(b_q, b_k, b_g, True, C, LEVELS, ACC, DOT)\n", ""),
    Mutant("forward: scores of the forward scan doubled", KERNELS, "            A += _scores(b_q, b_k, b_g, False, C, LEVELS, ACC, DOT)\n", "            A += 2 * _scores(b_q, b_k, b_g, False, C, LEVELS, ACC, DOT)\n"),
    Mutant("forward: reverse state read with forward sums", KERNELS, "b_o += _dot(b_q * tl.exp2(_sums(_met(C, True), b_g, ACC)), S_rev, ACC, DOT)", "b_o += _dot(b_q * tl.exp2(_sums(_met(C, False), b_g, ACC)), S_rev, ACC, DOT)"),
    Mutant("forward: result one percent small", KERNELS, "_store(o, b_o * scale, n * C", "_store(o, b_o * scale * 0.99, n * C"),
    Mutant("forward: last level of halving missing", LAUNCH, '"LEVELS": CHUNK.bit_length() - 1,', '"LEVELS": CHUNK.bit_length() - 2,'),
    # Kernels: the backward pass.
    Mutant("backward: dg without the decayed state", KERNELS, "dg = tl.zeros_like(g) + (tl.exp2(tl.sum(g, 0)) * tl.sum(S * dS, 1))[None, :]", "dg = tl.zeros_like(g)"),
    Mutant("backward: dg state term not decayed", KERNELS, "(tl.exp2(tl.sum(g, 0)) * tl.sum(S * dS, 1))[None, :]", "tl.sum(S * dS, 1)[None, :]"),
    Mutant("backward: dg counts queries alone", KERNELS, "dg += _sums(tl.trans(M), qE * dqE + kE * dkE, ACC)", "dg += _sums(tl.trans(M), qE * dqE, ACC)"),
    Mutant("backward: dg subtracts keys", KERNELS, "qE * dqE + kE * dkE, ACC)", "qE * dqE - kE * dkE, ACC)"),
    Mutant("backward: dg sums not transposed", KERNELS, "dg += _sums(tl.trans(M), qE * dqE + kE * dkE, ACC)", "dg += _sums(M, qE * dqE + kE * dkE, ACC)"),
    Mutant("backward: dg of the entering state missing", KERNELS, "    dg += _sums(tl.trans(M), qE * dqE, ACC)\n", ""),
    Mutant("backward: dg of the leaving state missing", KERNELS, "    dg += _sums(tl.trans(M), kE * dkE, ACC)\n", ""),
    Mutant("backward: dq without decay", KERNELS, "        dq += dqE * E\n        dk += dkE * E\n", "        dq += dqE\n        dk += dkE * E\n"),
    Mutant("backward: dk of the chunk missing", KERNELS, "        dk += dkE * E\n        dg", "        dg"),
    Mutant("backward: dk of the state missing", KERNELS, "    dk += dkE * E\n    dg", "    dg"),
    Mutant("backward: dA not transposed", KERNELS, "_dot(tl.trans(dA_level), qE, ACC, DOT)", "_dot(dA_level, qE, ACC, DOT)"),
    Mutant("backward: dA not masked by blocks", KERNELS, "dA_level = tl.where(same, dA, 0.0)", "dA_level = dA"),
    Mutant("backward: scores not transposed in dv", KERNELS, "b_dv += _dot(tl.trans(A), b_do, ACC, DOT)", "b_dv += _dot(A, b_do, ACC, DOT)"),
    Mutant("backward: dv of the state missing", KERNELS, "return dq, dk, dg, A, _dot(kE, dS, ACC, DOT), qE, kE", "return dq, dk, dg, A, 0 * _dot(kE, dS, ACC, DOT), qE, kE"),
    Mutant("backward: own token once in dq and dk", KERNELS, "self_dA = (FWD + REV) * tl.sum(b_do * b_v, 1)", "self_dA = tl.sum(b_do * b_v, 1)"),
    Mutant("backward: own token missing in dv", KERNELS, "b_dv = (FWD + REV) * tl.sum(b_q * b_k, 1)[:, None] * b_do", "b_dv = 0 * b_do"),
    Mutant("backward: dq and dk of a token swapped", KERNELS, "        b_dq = self_dA * b_k\n        b_dk = self_dA * b_q\n", "        b_dq = self_dA * b_q\n        b_dk = self_dA * b_k\n"),
    Mutant("backward: scale forgotten in dS_fwd", KERNELS, "            b_do = _load(do, n * C, T, V, C, BV, ACC) * scale\n            b_g", "            b_do = _load(do, n * C, T, V, C, BV, ACC)\n            b_g"),
    Mutant("backward: dS_fwd decays as a key", KERNELS, "b_q * tl.exp2(_sums(_met(C, False), b_g, ACC)), b_do, ACC, DOT)", "b_q * tl.exp2(_sums(~_met(C, False), b_g, ACC)), b_do, ACC, DOT)"),
    Mutant("backward: dS_rev carries the key", KERNELS, "dS_rev = _carry(dS_rev, b_g, from_edge, b_do, ACC, DOT)", "dS_rev = _carry(dS_rev, b_g, to_edge, b_do, ACC, DOT)"),
    Mutant("backward: dS_fwd of the previous chunk", KERNELS, "dS_fwd = tl.load(_edge(p_dS_fwd, i_state + n, BK, BV))", "dS_fwd = tl.load(_edge(p_dS_fwd, i_state + tl.maximum(n - 1, 0), BK, BV))"),
    Mutant("backward: parts of two batches share memory", KERNELS, "i_part = i_v * (tl.num_programs(0) // H) + i_b", "i_part = i_v + i_b"),
    # The launcher.
    Mutant("launch: directions swapped", LAUNCH, "return _checked(q, k, v, None if reverse else g, g if reverse else None, scale, precision)", "return _checked(q, k, v, g if reverse else None, None if reverse else g, scale, precision)"),
    Mutant("launch: mean becomes sum", LAUNCH, "return _checked(q, k, v, g_fwd, g_rev, scale / 2, precision)", "return _checked(q, k, v, g_fwd, g_rev, scale, precision)"),
    Mutant("launch: gradients of the gates swapped", LAUNCH, "    dg_fwd = None if g_fwd is None else dg[0]\n    dg_rev = None if g_rev is None else dg[-1]\n    return", "    dg_fwd = None if g_fwd is None else dg[-1]\n    dg_rev = None if g_rev is None else dg[0]\n    return"),
    Mutant("launch: blocks of V not added", LAUNCH, "grad.copy_(part.unflatten(0, (blocks, -1)).sum(0))", "grad.copy_(part.unflatten(0, (blocks, -1))[0])"),
    Mutant("launch: gradient of v told by identity", LAUNCH, "[grad if n == 2 else _parts(inputs[n], blocks)", "[grad if inputs[n] is v else _parts(inputs[n], blocks)"),
    Mutant("launch: one block of V only", LAUNCH, "return v.shape[0] * v.shape[1], triton.cdiv(v.shape[3], options[\"BV\"])", "return v.shape[0] * v.shape[1], 1"),
    Mutant("launch: both states in one memory", LAUNCH, "        _states(v, options), _states(v, options), scale, *_sizes(q, v), **options,", "        *[_states(v, options)] * 2, scale, *_sizes(q, v), **options,"),
    Mutant("launch: gradient read as if contiguous", LAUNCH, "*(_strided(x) for x in (q, k, v, g_fwd, g_rev, do)),\n            dq", "*(_strided(x) for x in (q, k, v, g_fwd, g_rev)), (do, *do.contiguous().stride()),\n            dq"),
    Mutant("launch: K and V exchanged", LAUNCH, "return q.shape[1], q.shape[2], q.shape[3], v.shape[3]", "return q.shape[1], q.shape[2], v.shape[3], q.shape[3]"),
    Mutant("launch: float64 clamped like float32", LAUNCH, '"LIMIT": 2000.0 if double else 300.0', '"LIMIT": 300.0'),
    Mutant("launch: gradient dtype of another tensor", LAUNCH, "grads = [_empty(x) for x in inputs]", "grads = [_empty(x).to(q.dtype) for x in inputs]"),
    Mutant("launch: scale lost in the backward pass", LAUNCH, "dq, dk, dv, *dg = _backward(q, k, v, g_fwd, g_rev, do, ctx.scale, ctx.precision)", "dq, dk, dv, *dg = _backward(q, k, v, g_fwd, g_rev, do, 1.0, ctx.precision)"),
]  # fmt: skip


def mutate(mutant: Mutant, root: Path) -> None:
    """Plant the bug in the copy of the project at `root`."""
    path = root / mutant.path
    source = path.read_text()
    if (found := source.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.name}: expected its anchor once in {mutant.path}, found it {found} times; update it")
    path.write_text(source.replace(mutant.old, mutant.new))


def run(mutant: Mutant, thorough: bool) -> dict:
    """Plant one bug in a copy of the project and run the tests.

    Returns the mutant's record: `killed_by`, the first test that failed (None if none did), and for each method the
    first test of it that failed. Unless `thorough`, the run stops at the first one.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("vig_ref", "tests", "pyproject.toml"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, root / name)
        mutate(mutant, root)
        failures = failed_tests(root, thorough)
    methods = {METHODS[test.split("::")[0]]: test for test in reversed(failures)}
    record = mutant._asdict() | {"layer": mutant.layer, "killed_by": failures[0] if failures else None, "methods": methods}
    return record | {"seconds": round(time.monotonic() - start, 1)}


def failed_tests(root: Path, thorough: bool) -> list[str]:
    """The tests that fail in the project at `root`, at most one of each file, in the order of METHODS."""
    files = [path for path in METHODS if (root / path).exists()]
    command = [sys.executable, "-m", "pytest", *files, "-v", "--one-failure-a-file" if thorough else "-x"]
    command += ["--hypothesis-profile", "mutants", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return [f"{files[0]}::time limit"]
    lines = [line for line in done.stdout.splitlines() if line.startswith("tests/") and "::" in line]
    failures = [line.split(" FAILED ")[0] for line in lines if " FAILED " in line]
    if done.returncode < 0 or (done.returncode != 0 and not failures):  # the process died, or nothing could be collected
        failures.append((lines or [f"{files[0]}::not importable"])[-1].strip() + " (crash)")
    return failures


def table(record: dict) -> str:
    """The record as Markdown: a row for each mutant, a column for each method, a cross where it saw the bug."""
    names = [name for name in METHODS.values() if any(name in m["methods"] for m in record["mutants"])]
    lines = ["| planted bug | " + " | ".join(names) + " |", "|---|" + ":-:|" * len(names)]
    for mutant in record["mutants"]:
        crosses = " | ".join("x" if name in mutant["methods"] else "" for name in names)
        lines.append(f"| {mutant['name']} | {crosses} |")
    seen = [sum(name in m["methods"] for m in record["mutants"]) for name in names]
    return "\n".join([*lines, f"| **seen, of {len(record['mutants'])}** | " + " | ".join(map(str, seen)) + " |"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", metavar="WORD", help="mutants whose name contains one of these words")
    parser.add_argument("--report", type=Path, metavar="JSON", help="run every method on every mutant, and write the record")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print a record as a Markdown table, and run nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time (default: %(default)s)")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return 0
    chosen = [m for m in MUTANTS if not args.only or any(word in m.name for word in args.only)]
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        futures = {pool.submit(run, mutant, args.report is not None): mutant for mutant in chosen}
        records = {}
        for future in tqdm(concurrent.futures.as_completed(futures), total=len(futures), unit="mutant"):
            records[futures[future].name] = record = future.result()
            tqdm.write(f"{record['seconds']:6.1f} s  {record['name']:55} {record['killed_by'] or 'SURVIVED'}")
    results = [records[mutant.name] for mutant in chosen]
    survivors = [r["name"] for r in results if (r["killed_by"] is None) != (r["equivalent_because"] is not None)]
    if args.report:
        args.report.write_text(json.dumps({"command": " ".join(sys.argv), "mutants": results}, indent=1) + "\n")
    print(f"{len(results)} mutants, {len(results) - len(survivors)} as expected" + "".join(f"\n  {name}" for name in survivors))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
