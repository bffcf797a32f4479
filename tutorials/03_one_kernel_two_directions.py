# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 3. One kernel, two directions
#
# **Time** 60 minutes with the exercises; the cells run in less than a minute · **Prerequisites** chapters
# [1](01_a_gate_is_a_memory.ipynb) and [2](02_from_a_loop_to_matmuls.ipynb); no Triton, no GPU · **Device** a laptop CPU with
# Linux (Triton is published for no other system; elsewhere, read along)
#
# **The question.** Chapter 2 turned the loop into matrix products, but PyTorch writes every intermediate result to
# memory and reads it back. How does a GPU compute both scans of Equation 6 in *one* launch, reading each input hardly
# more than once, and how near can that come to what the machine allows?
#
# **Words.** A GPU has many multiprocessors, an H200 132. A launch starts *programs*; each runs on one multiprocessor, as one
# or more *warps* of 32 *threads* that step together, and several programs share it. At a *barrier* a program's warps wait for
# each other. A thread has *registers*, the fastest memory and little of it; threads hand each other values through the
# *shared memory* of their multiprocessor. All multiprocessors share the *L2 cache*, 50 MB, which fetches *lines* of 128 bytes
# from the GPU's main memory. "Memory" below is that one.
#
# You write your first Triton kernel, then one chunk, then a scan. After that you can read the real one: all source
# shown below is fetched from [`vig_ref/fused/`](../vig_ref/fused/kernels.py) while the notebook runs.

# %%
import inspect
import json
import os
import textwrap
import warnings
from pathlib import Path
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: kernels are interpreted, on CPU tensors

import torch
import triton
import triton.language as tl
from exercises import check
from figures import ch03

import vig_ref
from vig_ref import tolerance, traffic
from vig_ref.chunked import chunks
from vig_ref.fused import anchored, blocks, kernels, launch
from vig_ref.fused.blocks import LOG2E, C, ahead, chunk, dot, load, sequence, store, sums

# A kernel may try a fast form first, and compute again where that overflows; the interpreter would say so each time.
warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
torch.set_num_threads(1)  # the tensors are small
inf = float("inf")


def equal(name, mine, right):
    close = torch.allclose(mine.double(), right.double(), rtol=1e-4, atol=1e-4)
    print(f"{name}: {close}, largest difference {(mine - right).abs().max():.0e} of {right.abs().max():.0f}")


def show(function, first="@triton.jit", last=None):
    """The source of a kernel, from the line that holds `first` to the next one that holds `last`, or to the end."""
    lines = inspect.getsource(function.fn).rstrip().split("\n")
    start = next(n for n, line in enumerate(lines) if first in line)
    end = next(n for n in range(start, len(lines)) if last in lines[n]) if last else len(lines) - 1
    print(textwrap.dedent("\n".join(lines[start : end + 1])), end="\n\n")


# %% [markdown]
# `TRITON_INTERPRET=1` makes Triton run kernels with NumPy, on CPU tensors, one program after the other. Slow, and the
# same source: what you write here compiles on a GPU.
#
# ## 1. A program, and its block
#
# A kernel is a function that a GPU runs many times at once. Each run is a **program**; all get the same arguments, and
# differ in one thing, their number. There is no loop over the data: a program asks who it is, computes the
# **addresses** of its own block, loads it, computes, and stores it.


# %%
@triton.jit
def alpha_kernel(p_g, p_alpha, p_who, T, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # the tokens that are mine  [BLOCK]
    g = tl.load(p_g + i, mask=i < T, other=0.0)  # a pointer and offsets: BLOCK addresses
    tl.store(p_alpha + i, tl.exp(g), mask=i < T)  # alpha = exp(g)
    tl.store(p_who + i, tl.program_id(0), mask=i < T)  # only for us to see


T, BLOCK = 37, 16
g = -torch.rand(T, generator=torch.Generator().manual_seed(0))
alpha, who = torch.full((T,), torch.nan), torch.full((T,), -1)
alpha_kernel[(triton.cdiv(T, BLOCK),)](g, alpha, who, T, BLOCK=BLOCK)  # [grid]: how many programs
equal("alpha_kernel = exp", alpha, g.exp())
print("which program wrote which token:", *who.tolist())

# %% [markdown]
# Six ideas, and there are hardly more:
#
# | in the kernel | what it is |
# |---|---|
# | `p_g` | a **pointer**: the address of the tensor's first element. No shape, no strides, no bounds |
# | `tl.program_id(0)` | the number of this program, from 0; the **grid**, in brackets at the launch, says how many there are |
# | `tl.arange(0, BLOCK)` | a **block** of so many numbers. All blocks have sizes that are powers of two, known when it compiles |
# | `BLOCK: tl.constexpr` | a compile-time constant: another BLOCK is another compiled kernel |
# | `tl.load`, `tl.store` | a block of addresses in, a block of values out, and back |
# | `mask` | which addresses exist. 37 is not a multiple of 16, and behind the end lies somebody else's memory |

# %%
ch03.programs(T, BLOCK)

# %% [markdown]
# *Three programs of BLOCK = 16 tokens for T = 37. The hatched part is masked: loads give `other`, stores do nothing.*
#
# `other=0.0` is chosen with care. A log gate of 0 forgets nothing, a key of 0 adds nothing: padding in registers that
# changes no result.
#
# ### Two dimensions, any strides
#
# A tensor `[B, H, T, K]` is one row of numbers in memory; its **strides** say how far apart neighbours are along each
# axis. So the address of token $t$, channel $c$ is `pointer + t * stride_t + c * stride_d`, and a block `[C, BK]` of
# addresses is a column plus a row. C, the tokens of a chunk, is a constant of the library, 16. This is what it loads all
# its inputs with:

# %%
for function in (blocks.chunk, blocks.tokens, blocks.tile, blocks.load):
    show(function)

# %% [markdown]
# `x` is a tuple of pointer and strides: views and transposed tensors are read where they lie, nothing is copied.
# `at` is a chunk as somebody meets who walks along the sequence: its first token on the way, and the `step` to the next,
# 1 to the right or −1 to the left. Hold on to that: it will save us half of the work. A token's number has
# 64 bits where an offset inside the sequence may reach $2^{31}$ (the launcher looks, in `_far`), and all offsets with
# it; where none can, 32 bits do, for fewer instructions. BK is K rounded up to a power of two; columns beyond K are
# masked too.
#
# ## 2. Sums of gates, by a matrix product
#
# A chunk needs $b_i = g_0 + \dots + g_i$ (chapter 2, `decay_to`). A running sum is a chain, each step waits for the one
# before. But a GPU has tensor cores, which do matrix products of 16 × 16 and more in a few clock cycles. So the sum
# is one, with a matrix of zeros and ones:
#
# $$b = M g, \qquad E = e^{M g}, \qquad M_{it} = 1 \text{ if the gate of token } t \text{ lies between token } i
# \text{ and the boundary}$$

# %%
show(blocks.ahead)
show(blocks.sums)

# %% [markdown]
# Our second kernel is made of the library's own pieces. The exponential is $2^x$, the one that the hardware has, and so
# log gates are multiplied by $\log_2 e$ once.


# %%
@triton.jit
def decay_kernel(g, E, T, K, BK: tl.constexpr):
    n = tl.program_id(0)  # one program a chunk
    b_g = load(g, chunk(n, 1), T, K, BK) * LOG2E  # [C, BK]
    M = ahead(True, True)  # 1 from the left edge to token i, itself included  [C, C]
    b = sums(M, b_g, "ieee")  # M g  [C, BK]
    store(E, tl.exp2(b), chunk(n, 1), T, K)


def sequence_of(x):
    return x[0, 0], *x.stride()[2:]


x = tolerance.draw(B=1, H=1, T=37, K=6, V=10, regime="vig")
E = torch.empty_like(x.g_fwd)
decay_kernel[(3,)](sequence_of(x.g_fwd), sequence_of(E), 37, 6, BK=16)
E_chunked = torch.exp(chunks.decay_to(chunks.cut(x.g_fwd, 16), reverse=False)).flatten(2, 3)[:, :, :37]
equal("E = exp2(M g), kernel = chunked", E, E_chunked)

# %% [markdown]
# Two details that cost somebody a day each:
#
# - **A gate of −∞.** $0 \cdot \infty$ is NaN, so a product $M g$ with an infinite gate is NaN even where $M$ is 0.
#   The library clamps log gates far below the point where the exponential is 0 anyway (`load_any_gate`), or lets
#   the NaN say that a faster way does not serve this gate (section 7).
# - **What M is made of.** Zeros, ones and minus ones would fit in int8. On an H200, with Triton 3.6, converting int8 to
#   bfloat16 in a block `[16, 16]` with 4 warps gave *wrong values*: no error, no NaN. It was found only because every
#   configuration is compared with the oracle before it is timed. So M is made of floats. The interpreter cannot show
#   such a thing: it runs the source, not what a compiler made of it.
#
# ## 3. One chunk
#
# Everything inside one chunk, one direction, is Equation 5 unrolled (chapter 2, `textbook`), and now fits in ten lines:
#
# $$A = \left( q \odot e^{b} \right) \left( k \odot e^{-b} \right)^\top \text{ where } i \ge j, \qquad o = A v$$
#
# $A$ is never written to memory. It lives in the registers of one program, between two products.


# %%
@triton.jit
def chunk_kernel(q, k, v, g, o, T, K, V, BK: tl.constexpr, BV: tl.constexpr):
    at = chunk(0, 1)
    b_q, b_k, b_v = load(q, at, T, K, BK), load(k, at, T, K, BK), load(v, at, T, V, BV)
    b = sums(ahead(True, True), load(g, at, T, K, BK) * LOG2E, "ieee")  # [C, BK]
    A = dot(b_q * tl.exp2(b), tl.trans(b_k * tl.exp2(-b)), tl.zeros((C, C), tl.float32), "ieee")
    reads = tl.arange(0, C)[:, None] >= tl.arange(0, C)[None, :]  # i >= j
    b_o = dot(tl.where(reads, A, 0.0), b_v, tl.zeros((C, BV), tl.float32), "ieee")  # A v
    store(o, b_o, at, T, V)


T = 13
one = [t[:, :, :T].contiguous() for t in x[:4]]  # q, k, v, g_fwd of the first 13 tokens
o = torch.full_like(one[2], torch.nan)
chunk_kernel[(1,)](*map(sequence_of, (*one, o)), T, 6, 10, BK=16, BV=16)
for backend in ("naive", "chunked", "fused"):
    equal(f"one chunk = {backend}", o, vig_ref.gla(*one, scale=1.0, backend=backend))

# %% [markdown]
# `dot` is `tl.dot` with the rounding named: `"ieee"` for float32 as it is, `"tf32"`, or `"bf16"`. Blocks of a product
# have at least 16 rows and columns; that, and `[C, C]` in registers, is why C = 16 here.
#
# ## 4. A scan: the loop over chunks
#
# Between chunks the state is carried, by steps 2 and 3 of chapter 2 in one line: what enters fades by `total`, each
# token's pair by what is met after it. The library's own:

# %%
show(blocks.carry)

# %% [markdown]
# The state is held **transposed**, `[BV, BK]`: a channel of $k$ and its gate are a column then, as in `[C, BK]` (and
# the tensor cores' result lies as their next operand must). Now the scan: one program per head, which walks through its
# chunks with the state in registers.


# %%
@triton.jit
def scan_kernel(q, k, v, g, o, H, T, K, V, BK: tl.constexpr, BV: tl.constexpr):
    i_b, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    q, k, g = sequence(q, i_b, i_h, 0), sequence(k, i_b, i_h, 0), sequence(g, i_b, i_h, 0)
    v, o = sequence(v, i_b, i_h, 0), sequence(o, i_b, i_h, 0)
    reads = tl.arange(0, C)[:, None] >= tl.arange(0, C)[None, :]
    S = tl.zeros((BV, BK), tl.float32)
    for n in range(tl.cdiv(T, C)):
        at = chunk(n, 1)
        b_q, b_k, b_v = load(q, at, T, K, BK), load(k, at, T, K, BK), load(v, at, T, V, BV)
        b_g = load(g, at, T, K, BK) * LOG2E
        b = sums(ahead(True, True), b_g, "ieee")
        A = dot(b_q * tl.exp2(b), tl.trans(b_k * tl.exp2(-b)), tl.zeros((C, C), tl.float32), "ieee")
        b_o = dot(b_q * tl.exp2(b), tl.trans(S), tl.zeros((C, BV), tl.float32), "ieee")  # across: (q exp(b)) S
        b_o = dot(tl.where(reads, A, 0.0), b_v, b_o, "ieee")  # inside: + A v
        b_kE = b_k * tl.exp2(sums(ahead(False, False), b_g, "ieee"))  # what fades after j, to the right edge
        S = dot(tl.trans(b_v), b_kE, tl.exp2(tl.sum(b_g, 0))[None, :] * S, "ieee")  # exp(total) S + S_own
        store(o, b_o, at, T, V)


# %%
def launch_scan(kernel, q, k, v, g):
    """Runs a kernel like the one above, one program per batch and head; o is NaN where the kernel writes nothing."""
    B, H, T, K = q.shape
    V, o = v.shape[3], torch.full_like(v, torch.nan)
    tensors = [(t, *t.stride()) for t in (q, k, v, g, o)]
    kernel[(B * H,)](*tensors, H, T, K, V, BK=max(16, triton.next_power_of_2(K)), BV=16)
    return o


x = tolerance.draw(B=1, H=2, T=37, K=6, V=10, regime="vig")
o_fwd = launch_scan(scan_kernel, *x[:4])
for backend in ("naive", "chunked", "fused"):
    equal(f"scan = {backend}", o_fwd, vig_ref.gla(*x[:4], scale=1.0, backend=backend))

# %% [markdown]
# Compare the traffic with chapter 2: inputs are read once, the result is written once, and **the state never leaves the
# chip**.
#
# **Exercise 1.** The reverse scan, $S_t = \alpha_t \odot S_{t+1} + k_t^\top v_t$. Copy `scan_kernel` and turn it round;
# do not flip a tensor. Who reads a sequence from its other end finds the reverse scan to be the forward one: two places
# change.


# %%
@triton.jit
def reverse_kernel(q, k, v, g, o, H, T, K, V, BK: tl.constexpr, BV: tl.constexpr):
    """Like `scan_kernel`, from the last token to the first."""
    ...  # your turn


def reverse_in_chunks(q, k, v, g):
    """o of the reverse scan with scale 1, `[B, H, T, V]`."""
    return launch_scan(reverse_kernel, q, k, v, g)


check(reverse_in_chunks)

# %% [markdown]
# ## 5. One launch for both
#
# Equation 6 wants the mean of both scans: $o_t = \frac{\text{scale}}{2}\,(q_t \overrightarrow{S}_t + q_t
# \overleftarrow{S}_t)$. Can one program do both? Token $t$ needs what lies left of it and what lies right of it, and a
# program meets chunks one after the other. So it walks twice:
#
# 1. **right to left**: carry $\overleftarrow{S}$, and leave what this scan adds to o, the chunk's *share*, in memory,
#    as a rule where o will be;
# 2. **left to right**: carry $\overrightarrow{S}$, add the share, and write o.
#
# No program waits for another, or reads what another wrote. That is why one launch is enough. Inside a program, a
# barrier between the walks makes what its threads wrote visible to all of them.

# %%
ch03.walks()

# %% [markdown]
# *Both walks over four chunks.*
#
# Here is a walk in the real kernel, the same lines for both: `step` is −1 in the first, and each chunk is read from its
# right end, so that in a block left always means *met before*. The first walk gets memory for its share as `o`, the
# second `share` too, which for `gla`, one direction, is `None` in either.

# %%
show(anchored._prepare)
show(anchored.forward_anchored, "for i in tl.range", "store_share")

# %% [markdown]
# Compare with your own scan of section 4. One thing is new, and section 6 is about it: `b`, from `_middle`, counts from the
# chunk's middle, and a state goes from middle to middle, faded by the gates `between` them; so no factor takes a key on to the
# chunk's edge. `_prepare` computes what needs no state. `load_gate` loads log gates in base 2, `operand` rounds what goes
# into a product, `scale_columns` fades a state, and `least` keeps the smallest exponents for section 7. `tl.range(..., num_stages=STAGES)` lets the compiler fetch the
# next chunks while this one is computed. (`b_vT` is $v$ once more, in the layout of the product that wants it transposed.)
# Take `EARLY` for false; where it is true, a chunk is prepared while the one before is multiplied, which does not wait
# for it. The share goes through these two:

# %%
for function in (blocks.other_share, blocks.store_share):
    show(function)

# %% [markdown]
# Let us look at the share. The launcher finds a place for it in `_share`: o itself, or scratch memory where o is less precise
# than the products, or its rows are too short to fill a cache line, as ours are. We keep a reference, and call the operator.

# %%
kept, allocate = [], launch._share


def keep(*args):
    kept.append(allocate(*args))
    return kept[-1]


y = tolerance.draw(B=1, H=1, T=40, K=8, V=12, regime="vig")
with mock.patch.object(launch, "_share", keep):
    vig_ref.bidirectional_gla(*y[:5], backend="fused")
print("memory for the share:", list(kept[0].shape), kept[0].dtype)
share = kept[0][0, 0]  # [T, V]

# %% [markdown]
# **Predict**: what should the share of a token be?

# %%
equal("the share = half of the reverse scan", share, vig_ref.gla(y.q, y.k, y.v, y.g_rev, reverse=True)[0, 0] / 2)

# %% [markdown]
# ### Or a state instead of a share?
#
# Both directions read the same q and k, so one could do the work of a chunk for both at once. The first walk would leave
# the reverse *state* of each chunk, and the second, with both states at hand, take one `A` for both directions (lower triangle
# from one scan, upper from the other), and one product $A v$. Fewer products, and our kernel began like this. Count the
# bytes that go through memory between the walks for a token of ViG-T, and what a program holds in registers:

# %%
K, V, half = 32, 64, 2  # ViG-T; bytes of bfloat16
print("a share of o:", half * V, "bytes a token; a state a chunk:", half * K * V // launch.CHUNK, "bytes a token")

# %% [markdown]
# And two of everything, for the two directions, is more than the registers of a GPU's threads hold. The compiler then
# *spills*: it moves values to memory and back. Ours were addresses, at the head of every load, and the
# kernel waited for those more than for anything else ([lab notebook](../docs/lab_notebook.md#what-helped)).
#
# In the backward pass a share would not do: the gradients of a chunk want $S$ from one side and $dS$ from the other. Its
# first walk carries the reverse state and the gradient of the forward one, and leaves both for every chunk, `[BV, BK]`;
# the second carries the other two. Not one state a token: chapter 2's argument. (With ViG's heads they need no memory of
# their own: rounded to bfloat16 they fit where the gradients of the chunk's tokens will be written next.) And not in
# registers, of which a whole multiprocessor (SM) has 256 KiB, to be shared by several programs:

# %%
states = triton.cdiv(196, launch.CHUNK)  # T = 196
print(f"{states} states of [64, 32] in float32: {states * 64 * 32 * 4 / 1024:.0f} KiB")

# %% [markdown]
# ## 6. The boundary in the middle
#
# Chapter 2 ended with a warning. Splitting $e^{b_i - b_j}$ into $e^{b_i} e^{-b_j}$ has one positive exponent, which
# grows with all that the chunk forgets; it overflows float32 at 88, in base 2 at 128. Halving never overflows, but
# needs $\log_2 C$ levels: for C = 16 four small products in the place of one. The kernel wants one product whenever
# that is safe.
#
# First step: count $b$ from the middle of the chunk. Then the largest exponent is what *half* a chunk forgets.

# %%
b_edge = chunks.decay_to(torch.full((16, 1), -8.0), reverse=False)[:, 0] * LOG2E.value  # base 2
b_middle = b_edge - b_edge[7]
ch03.exponents(b_edge, b_middle)

# %% [markdown]
# *b of a chunk of 16 tokens with g = −8 each, in base 2, from its edge and from its middle. Left, exp2(−b) leaves
# float32; right, it stays inside on both sides.*
#
# For tokens that the scan meets after the middle, $b_i$ is the sum of gates from the middle to $i$. For those that it meets
# before, it is *minus* the sum of the gates from $i$ (not included) to the middle, so that still $e^{b_i - b_j}$ is the decay
# from $j$ to $i$. All tokens of the chunk read one state: what *earlier chunks* left, faded to the middle. Tokens met before
# the middle read it with $e^{b_i} > 1$, which takes back the decay from them to the middle. This is why states are carried
# from middle to middle.
#
# **Exercise 2.** Which M gives this $b = M g$? The middle lies between tokens C/2 − 1 and C/2; the reverse scan meets
# the right half first.


# %%
def middle_matrix(C: int, reverse: bool):
    """M `[C, C]` of 0, 1 and -1, with b = M g counted from the middle."""
    ...  # your turn


check(middle_matrix)

# %% [markdown]
# The kernel's own, and how a state gets from one middle to the next, across the far half of one chunk and the near half
# of another:

# %%
for function in (anchored._middle, anchored._first_and_last_half, anchored._between):
    show(function)

# %% [markdown]
# ## 7. For every gate: look, and compute again
#
# A moved boundary without a check only moves the gate at which a kernel fails. But `_between` has just summed the gates
# from one middle to the next, and the walk keeps the smallest of these sums in `lowest` (for the far half of a walk's last
# chunk, which lies between no two middles, that is done after the loop). Every half of a chunk is part of one such sum,
# so no exponent is larger in size. A gate of −∞ makes a sum −∞ or NaN, and neither is taken for exact. So the program
# *knows* when it has gone too far, and the kernel, first the fast path for both directions, ends like this:

# %%
show(kernels._exact)
show(kernels.forward_kernel, "lowest = tl.zeros")
print(f"BOUND = {launch.BOUND}")

# %% [markdown]
# `halving.py` is chapter 2's `intra_chunk`, level by level, and right for every gate; it writes all results of that
# program once more. **Predict**: all gates are equal, the chunk has 16 tokens, half a chunk has 8. At which gate
# does the kernel turn to halving, and at which would the fast path break?

# %%
half_chunk, log2e = launch.CHUNK // 2, LOG2E.value
print(f"turns to halving beyond g = {launch.BOUND / (2 * half_chunk * log2e):.1f}")
print(f"exp2(-b) leaves float32 at about g = {-128 / (half_chunk * log2e):.1f}")

# %% [markdown]
# Measure: the fast path alone (BOUND = −∞: no check), halving alone (BOUND = +∞), and the kernel as it is.

# %%
z = tolerance.draw(B=1, H=1, T=32, K=8, V=8)


def error(gate, bound=launch.BOUND):
    gates = [torch.full_like(z.q, gate)] * 2
    exact = vig_ref.bidirectional_gla(*(t.double() for t in (*z[:3], *gates)), backend="naive")
    with mock.patch.object(launch, "BOUND", bound):
        o = vig_ref.bidirectional_gla(*z[:3], *gates, backend="fused")
    return ((o - exact).abs().max() / exact.abs().max()).item()


gates = [-0.04, -0.5, -2.0, -3.0, -5.0, -8.0, -10.0, -12.0, -20.0, -100.0]
ways = {"fast path, no check": -inf, "halving": inf, "the kernel": launch.BOUND}
ch03.errors(gates, {name: [error(gate, bound) for gate in gates] for name, bound in ways.items()}, launch.BOUND)

# %% [markdown]
# *Largest error over largest result in float32. The fast path alone is as good as halving, then loses digits where its
# factors become too small for float32, then returns NaN. The kernel leaves it before any of this.*
#
# The backward pass has a bound of its own, and a tighter one: in a gate's gradient, terms of size 1 cancel to what is
# left of them, and that [must not be lost in rounding](../docs/numerics.md).
#
# A reset is a gate of −∞, and so always below the bound. The check is made by each program for itself: one head with a
# strong gate does not slow the others down. Count how often halving is entered, for four heads, of which one has a
# single reset:

# %%
z4 = tolerance.draw(B=1, H=4, T=32, K=8, V=8, regime="vig")
z4.g_fwd[0, 2, 11, 5] = -inf
with mock.patch.object(kernels, "forward_halving", wraps=kernels.forward_halving) as again:
    o = vig_ref.bidirectional_gla(*z4[:5], backend="fused")
equal("with a reset, fused = chunked", o, vig_ref.bidirectional_gla(*z4[:5], backend="chunked"))
print(f"programs: 4, of which {again.call_count // 2} computed both directions again")

# %% [markdown]
# A check has to see *every* gate. So try a reset at each token, each in an image of its own, in both directions at
# once:

# %%
r = tolerance.draw(B=32, H=1, T=32, K=8, V=8, regime="vig")
for i in range(32):
    r.g_fwd[i, :, i] = r.g_rev[i, :, 31 - i] = -inf
o = vig_ref.bidirectional_gla(*r[:5], backend="fused")
exact = vig_ref.bidirectional_gla(*(t.double() for t in r[:5]), backend="naive")
right = ((o - exact).abs() < 1e-4).flatten(1).all(1)
print(f"right: {right.sum()} of {len(right)} images")

# %% [markdown]
# Why so thorough? While this chapter was written, that very cell found the check blind in one place. You will meet it
# among the common mistakes.
#
# ## 8. Few sequences, long ones
#
# The grid has one program per batch and head. An H200 has 132 multiprocessors (SMs): with B = 256 and H = 3 there are
# 768 programs, with one large image there are 3, and 129 SMs have nothing to do. So long sequences are cut into
# **segments**, and each segment gets a program:

# %%
print("tokens  tokens per segment  programs for B = 1, H = 3")
for T in (196, 1024, 4096, 16384, 65536):
    segment = launch._segment(T)
    print(f"{T:6}  {segment:18}  {3 * triton.cdiv(T, segment):25}")

# %% [markdown]
# But a segment must know the state that enters it. Two small launches come first: one finds, for every segment alone,
# what it adds to the state of each direction, and the decay across it; one combines these. The rule to combine two
# stretches is all of it.
#
# **Exercise 3.** A stretch of tokens is a pair: the log decay `total` across it, and the state `S` that it alone
# leaves. What is the pair of two stretches, one after the other in the order of the scan?


# %%
def then(total_1, S_1, total_2, S_2):
    """The pair (total, S) of stretch 1 followed by stretch 2. total: [K], natural logarithms; S: [K, V]."""
    ...  # your turn


check(then)

# %% [markdown]
# The rule is *associative*: (1 then 2) then 3 is 1 then (2 then 3). So the segments need not be combined one by one; a
# tree, `tl.associative_scan`, does it in $\log_2$ steps. Yet the kernel goes from one to the next, chapter 2's step 3:

# %%
show(kernels.combine_kernel, "for i in tl.range", "p_enter +=")

# %% [markdown]
# No number of a state waits for another one, so that there are thousands of such loops at once, and each step is one
# multiplication and one addition; the numbers of later segments are on their way meanwhile. An H200 took 9 µs for the tree
# over 64 segments of four images, and takes 6 for the loop. Make segments tiny, to have some:

# %%
long = tolerance.draw(B=1, H=1, T=80, K=6, V=10, regime="vig")
with mock.patch.object(launch, "SEGMENT", 32):
    print("segments:", triton.cdiv(80, launch._segment(80)), "of", launch._segment(80), "tokens")
    o = vig_ref.bidirectional_gla(*long[:5], backend="fused")
for backend in ("naive", "chunked", "fused"):
    equal(f"three segments = {backend}", o, vig_ref.bidirectional_gla(*long[:5], backend=backend))

# %% [markdown]
# Why not one launch here as well? A program would have to wait for states that others compute, and may wait only for
# programs that are certain to run at the same time, which a grid does not promise. Three launches are right on every
# scheduler. ViG at 224 × 224 has T = 196: one segment, one launch.
#
# ### Many long sequences: two programs walk towards each other
#
# Segments cost: each is read twice, once for its states and once for the result. They are for *few* sequences. A batch
# of 64 images of 512 × 512 pixels has 192, with T = 1024. With a program each, some of 132 multiprocessors have two and
# others one, and walk for long. So each sequence gets **two** programs, one for each scan, which set out from
# its two ends:
#
# 1. up to the middle each is the first to come by: it leaves its share of o, and where they meet, its state;
# 2. beyond the middle each finds the other's share, adds its own, and writes o.
#
# A launch ends where they meet. The next one takes up the states: nobody waits for anybody, and no token is read more
# than twice. The launcher does so with `launch.MANY` sequences or more; say that one is many:

# %%
with mock.patch.object(launch, "SEGMENT", 32), mock.patch.object(launch, "MANY", 1):
    o = vig_ref.bidirectional_gla(*long[:5], backend="fused")
for backend in ("naive", "chunked"):
    equal(f"two halves = {backend}", o, vig_ref.bidirectional_gla(*long[:5], backend=backend))

# %% [markdown]
# ## 9. Forward and backward, through the front door
#
# The backward pass of [chapter 4](04_gradients_by_hand.ipynb) needs both states and the gradients of both; two of the four
# travel right to left, and two left to right, so two walks do. Each is a launch of its own: the first has so much less to
# carry that twice as many of its programs fit on a multiprocessor. The states of chunks are computed again rather than
# kept; those that enter segments are kept. Everything through the public function, against the oracle:

# %%
w = tolerance.draw(B=1, H=2, T=37, K=6, V=10, regime="vig")
exact = tolerance.reference(w, scale=0.5)  # naive, in float64
for backend in ("naive", "chunked", "fused"):
    got = tolerance.evaluate(vig_ref.bidirectional_gla, w, scale=0.5, backend=backend)
    errors = {name: ((got[name] - exact[name]).abs().max() / exact[name].abs().max()).item() for name in exact}
    print(f"{backend:8}", *(f"{name} {value:.0e}" for name, value in errors.items()), sep="  ")

# %% [markdown]
# All three are right to float32. *How* right a kernel has to be, and how that is tested, is
# [chapter 8](08_how_to_trust_a_kernel.ipynb).
#
# ## 10. The roofline: what the machine allows
#
# How fast can this be at best? Count two things, and divide by what the machine can do:
#
# - **bytes** that must move between memory and chip: each input once, the result once;
# - **FLOPs**, of which a multiplication with its addition has two.
#
# No kernel of this algorithm beats either; the larger of the two times is the floor. First the bytes.
#
# **Exercise 4.** For one token of one head, with q, k, v and o in bfloat16 (2 bytes).


# %%
def least_bytes(K: int, V: int, gate: int) -> int:
    """Bytes that any kernel of Equation 6 must read and write per token and head; a gate has `gate` bytes."""
    ...  # your turn


check(least_bytes)

# %% [markdown]
# For ViG-T it is 512 with gates in bfloat16 and 640 with gates in float32:

# %%
K, V = 32, 64
q_k, v_o = 2 * 2 * K, 2 * 2 * V  # two of each, 2 bytes a number
floor_bytes = {gate: q_k + v_o + 2 * gate * K for gate in (2, 4)}  # and two gates
print({f"{gate} bytes a gate": n for gate, n in floor_bytes.items()})

# %% [markdown]
# Now the FLOPs of the fast path, from the sources above. Per token and direction: it is written into the state, 2KV, and
# reads it, 2KV; its row of scores is 2CK, and $A v$ 2CV. A sum of gates is two products of bfloat16 (`sums` cuts them
# into a high and a low half), 2 · 2CK; there are two, $M g$ and, in `_between`, both halves at once.

# %%
CHUNK = launch.CHUNK  # C as a number
state, scores, sums_, values = 2 * K * V + 2 * K * V, 2 * CHUNK * K, 2 * 2 * CHUNK * K, 2 * CHUNK * V
flops = 2 * (state + scores + 2 * sums_ + values)
print(f"{flops} FLOPs; per byte:", {f"{gate} bytes a gate": round(flops / n) for gate, n in floor_bytes.items()})

# %% [markdown]
# And the machine, an NVIDIA H200. Its data sheet: 4.8 TB/s of memory, 989 TFLOP/s in dense bfloat16 products. A copy in
# memory, which does nothing but move bytes, came to about 4.3 TB/s when the kernel was planned, and that is what we divide
# by; the record below measures it anew.

# %%
COPY, TENSOR = 4.3e12, 989e12  # bytes and FLOPs a second
tokens = 256 * 3 * 196  # B * H * T: a batch of 256 images at 224 x 224 in ViG-T
for gate, n in floor_bytes.items():
    print(f"memory, {gate} bytes a gate: {tokens * n / COPY * 1e6:.1f} µs")
print(f"products: {tokens * flops / TENSOR * 1e6:.1f} µs")

# %%
loop_bytes = floor_bytes[4] + 2 * 2 * 4 * K * V  # the state of each scan read and written at every token, in float32
points = {"fused, float32 gates": flops / floor_bytes[4], "a loop, state in memory": 2 * 5 * K * V / loop_bytes}
ch03.roofline(points, COPY, TENSOR)

# %% [markdown]
# *The roofline. An operation with few FLOPs per byte lies under the slope: memory limits it, and no arithmetic trick
# helps. The kink is where products begin to matter.*
#
# The operator lies well to the left of the kink: **bytes decide**. Moving the state with every token would cost another
# factor:

# %%
factor = loop_bytes / floor_bytes[4]
print(f"state in memory: {factor:.0f} times the bytes, {tokens * loop_bytes / COPY * 1e6:.0f} µs at least")

# %% [markdown]
# ### Predict
#
# The floor counts each byte once. Our kernel reads q, k and v in both walks, and writes and reads the share of o, in
# bfloat16. If the second reading always finds the data in the L2 cache, only the floor counts; if it never
# does, all of it. So the prediction is a range, for float32 gates (`vig-ref bench traffic` counts the same, for all
# layers and for the backward pass):

# %%
again = 2 * (2 * K + V)  # q, k, v in the other walk
share_bytes = 2 * 2 * V  # a share of o, bfloat16, written and read
most_bytes = floor_bytes[4] + again + share_bytes
print("as the library counts:", most_bytes == traffic.fused(K, V, T=196)["forward"])
low, high = (tokens * n / COPY * 1e6 for n in (floor_bytes[4], most_bytes))
print(f"{floor_bytes[4]} to {most_bytes} bytes a token and head: {low:.0f} to {high:.0f} µs")
between = tokens * (again + share_bytes / 2) / 2**20
print(f"between its walks the whole grid would leave {between:.0f} MiB in the L2 cache, which has 50")

# %% [markdown]
# This is a bound for *memory* only. A kernel can miss it for another reason: instructions. Exponentials, conversions,
# address arithmetic and waiting for the step before do not appear in a roofline, and a scan has a chain of steps in
# each program. So the sentence to test is: "forward at B = 256, T = 196 takes what its bytes take". If the record says
# more, bytes are not what limits it.
#
# ## 11. What the GPU record says
#
# A laptop cannot test it. `vig-ref bench ops` measures on a GPU, after checking each result against the oracle, and
# writes a record; ours is `docs/results/h200-ops.json`.

# %%
path = Path("../docs/results/h200-ops.json")
record = json.loads(path.read_text()) if path.exists() else None
if record is None:
    print(
        "Not recorded yet: there is no measurement of the operator on a GPU in docs/results, and so nothing is claimed."
    )
else:
    ch03.describe(record, tokens * floor_bytes[4])
    ch03.table(record, "forward")
    ch03.table(record, "forward+backward")

# %%
ch03.record(record, low, high)

# %% [markdown]
# *Time of the forward pass on an H200, with the predicted range of T224. T224 is ViG-T at 224 × 224 with a batch of
# 256; the other T's have larger images and smaller batches, `b1` a batch of one. H-T s1 is the first stage of
# ViG-H-T.*
#
# Was the sentence right? At T224 the table has 0.0492 ms, 49.2 µs, and the prediction ended at 40. So bytes are most of
# it, and not all. What else there is, the GPU's own counters say, on the page
# [performance](../docs/performance.md#what-limits-it-now): shared memory, through which inputs come and warps hand each
# other operands, is busy in about three cycles of four, and too few warps fit on a multiprocessor to hide the waiting.
#
# How to read it, here and on your own GPU:
#
# - **fused / floor** says how far memory is from being the limit; 1 is perfect.
# - **sdpa** is softmax attention, whose time grows with T²: compare along the shapes, not at one of them.
# - **Small shapes** measure the launch, not the kernel.
# - A time without the check that the result is right is worth nothing. See the int8 above.
#
# ## Common mistakes
#
# Some were made here, the others are planted in [`tests/mutants.py`](../tests/mutants.py) or are known from published
# kernels.
#
# | mistake | what you see |
# |---|---|
# | **No mask, or a mask on rows only** | Nothing, until the memory behind the tensor is NaN ([chapter 8](08_how_to_trust_a_kernel.ipynb), red zones) or belongs to somebody. |
# | **A fast path whose check does not see all gates.** Our first one looked at the sums *between the middles* of neighbouring chunks. The far half of the last chunk lies between no two middles | Right everywhere, NaN for a reset in the last eight tokens of a scan. Found by the cell that tries every token. |
# | **Converting int8 to bfloat16** (4 warps, `[16, 16]`, Triton 3.6) | Wrong values on the GPU, right ones in the interpreter. Check each configuration on the device before timing it. |
# | **$M g$ with $g = -\infty$** | NaN in every row, as $0 \cdot \infty$ is. Clamp first. |
# | **No barrier between the walks** | Right in the interpreter, where a program is one thread; on a GPU wrong now and then. |
# | **32-bit offsets** | Right until an offset exceeds $2^{31}$. They are cheaper, so the launcher looks whether they suffice. |
# | **bfloat16 in the interpreter** | Wrong products: it multiplies bit patterns. Test bfloat16 on a GPU. |
# | **`TRITON_INTERPRET` set after Triton was imported** | "backend 'fused' needs CUDA tensors". Set it in the first cell, or in the shell. |
# | **The reverse scan by flipping copies** | Right, and every input is copied once more than it is read. |
#
# ## Summary
#
# - A program asks who it is, computes addresses, loads a block under a mask, computes, stores.
# - Sums of gates are a product with a 0/1 matrix, $E = e^{M g}$; scores stay in registers, the state too.
# - Two walks in one program: the reverse scan leaves its share of o for each chunk, the forward scan adds its own.
#   No program waits for another, so one launch is enough; the backward pass takes two, a walk each. Long sequences are
#   cut, into halves if they are many, and into segments if they are few, for which two small launches come first.
# - The fast path puts the boundary into the middle of a chunk, and looks at what the chunks forget; where that is too
#   much, the program computes again by halving. Every gate from 0 to −∞ is right.
# - Count bytes and FLOPs before you measure. Here bytes set the floor, and the difference to it is what a measurement is
#   to explain.
#
# Next: [4. Gradients by hand](04_gradients_by_hand.ipynb).
