# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 2. From a loop to matmuls
#
# **Time** 60 minutes with the exercises; the cells run in half a minute · **Prerequisites** [chapter
# 1](01_a_gate_is_a_memory.ipynb), broadcasting · **Device** a laptop CPU
#
# **The question.** The recurrence takes T steps, each needs the one before, and each is far too small for the machine.
# How can the same numbers come out of a few matrix products, without overflow, for *every* gate from 0 to −∞?
#
# At the end you have the four steps of [`vig_ref/chunked/chunks.py`](../vig_ref/chunked/chunks.py), by the same names,
# and you will have predicted how much faster they are before you measure it.

# %%
import os
import time

os.environ["TRITON_INTERPRET"] = "1"  # Triton's interpreter runs the fused kernels here, on CPU tensors; no GPU is used

import torch
from exercises import LAYERS, check
from figures import ch02
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vig_ref
from vig_ref import naive, tolerance
from vig_ref.chunked import chunks

torch.set_num_threads(1)
inf = float("inf")


def equal(name, mine, right):
    print(f"{name}: {torch.allclose(mine, right)}, largest difference {(mine - right).abs().max():.0e}")


# %% [markdown]
# ## The loop, and what it costs
#
# This is Equation 5, one head, one direction, as in chapter 1; `states` keeps every $S_t$ to compare with.


# %%
def loop(q, k, v, g):
    S, o, states = torch.zeros(k.shape[1], v.shape[1], dtype=v.dtype), [], []
    for t in range(len(q)):
        S = g[t].exp()[:, None] * S + k[t, :, None] * v[t, None, :]  # S_t = G_t * S_t-1 + k_t^T v_t  (Eq. 5)
        o.append(q[t] @ S)  # o_t = q_t S_t
        states.append(S)
    return torch.stack(o), torch.stack(states)  # [T, V], [T, K, V]


T, K, V, C = 48, 4, 6, 16
x = tolerance.draw(B=1, H=1, T=T, K=K, V=V, regime="vig", dtype=torch.float64)
q, k, v, g = (t[0, 0] for t in (x.q, x.k, x.v, x.g_fwd))  # [T, K], [T, K], [T, V], [T, K]
o_loop, states = loop(q, k, v, g)

# %% [markdown]
# Count the **elements that move**, for one token of one head. The loop reads $q_t, k_t, g_t$ (3K) and $v_t$ (V),
# writes $o_t$ (V), and reads and writes the state (2KV). In ViG-T, K = 32 and V = 64:

# %%
inputs, state = 3 * 32 + 2 * 64, 2 * 32 * 64
print(f"q, k, g, v, o: {inputs} elements a token; the state: {state}, that is {state / (state + inputs):.0%} of all")

# %% [markdown]
# Nineteen of twenty elements moved are the state, carried from one token to the next. If it were carried once per
# *chunk* of C tokens, that part would shrink by C. That is the whole idea; the rest of the chapter is how to keep it
# exact.
#
# ## The loop, unrolled
#
# Put Equation 5 into itself. Token $i$ reads token $j \le i$ with the weight of exercise 2 of chapter 1:
#
# $$o_i = \sum_{j \le i} A_{ij}\, v_j, \qquad
# A_{ij} = q_i \cdot \left( k_j \odot e^{g_{j+1} + \dots + g_i} \right) = \sum_c q_{ic}\, k_{jc}\, e^{b_{ic} - b_{jc}}, \qquad
# b_i = g_0 + \dots + g_i$$
#
# So the scan is a T × T matrix times $v$. Written down directly:


# %%
def pairs(q, k, v, g):
    """Every pair at once: exact, and T * T * K numbers large. q, k, g: [..., T, K], v: [..., T, V]."""
    b = g.cumsum(-2)  # cumulative log gate  [..., T, K]
    E = torch.exp(b[..., :, None, :] - b[..., None, :, :])  # exp(b_i - b_j)  [..., T, T, K]
    A = torch.einsum("...ic,...jc,...ijc->...ij", q, k, E).tril()  # scores; j <= i  [..., T, T]
    return A, A @ v


A, o = pairs(q, k, v, g)
equal("all pairs = loop", o, o_loop)
ch02.weights(A, f"A  [T, T] = [{T}, {T}]")

# %% [markdown]
# *The weights of one head, unrolled, with gates as ViG has them: what lies far below the diagonal fades.*
#
# No step waits for another, but `E` has a number for every pair *and channel*: for T = 4096, K = 32 that is half a
# billion a head. We want products of matrices `[T, K]`, not a cube.
#
# ## The textbook's way, and where it fails
#
# The exponential of a difference is a product, $e^{b_i - b_j} = e^{b_i}\, e^{-b_j}$, so the decay can be given to $q$
# and $k$:
#
# $$A = \left( q \odot e^{b} \right) \left( k \odot e^{-b} \right)^\top, \quad \text{lower triangle}$$
#
# One matrix product. It is right on paper, and for these inputs:


# %%
def textbook(q, k, v, g):
    b = g.cumsum(-2)
    A = ((q * b.exp()) @ (k * (-b).exp()).mT).tril()  # A = (q exp(b)) (k exp(-b))^T
    return A @ v


equal("textbook = loop, float64", textbook(q, k, v, g), o_loop)

# %% [markdown]
# $b$ only falls, so $e^{b}$ is harmless. But $-b$ only grows, and $e^{-b}$ has no bound. **Predict**: float32 ends
# near $3.4 \cdot 10^{38} = e^{88.7}$. All gates are $g = -8$. After how many tokens is $e^{-b}$ infinite? And what is
# infinity times the $e^{b_i} \approx 0$ that should cancel it?

# %%
b = torch.full((16,), -8.0).cumsum(0)
for t in (0, 5, 10, 11, 12, 15):
    print(f"token {t:2}: exp(-b) = {(-b[t]).exp():8.1e}, exp(b) exp(-b) = {b[t].exp() * (-b[t]).exp():.5f}, on paper 1")

# %% [markdown]
# From token 11 on, the twelfth, $e^{-b}$ is infinite; from token 12 on $e^{b}$ is 0, and $0 \cdot \infty$ is NaN,
# which reaches every result that it is added to. A smaller chunk helps as long as C · |g| stays below 88: for one
# chunk of C tokens in float32, against the loop in float64,

# %%
decays, sizes = [0.04, 1.0, 2.0, 5.0, 8.0, 20.0, 100.0], [8, 16, 32, 64]


def relative_error(way, g, C):
    y = tolerance.draw(B=1, H=1, T=C, K=32, V=64)
    q, k, v, gates = y.q, y.k, y.v, torch.full_like(y.q, -g)
    exact = naive.gla(*(t.double() for t in (q, k, v, gates)), reverse=False, scale=1.0)
    return (way(q, k, v, gates) - exact).abs().max() / exact.abs().max()


ways = {"exp(b) exp(-b)": textbook, "halving (below)": lambda *args: chunks.intra_chunk(*args, reverse=False)}
found = {name: torch.tensor([[relative_error(w, g, C) for C in sizes] for g in decays]) for name, w in ways.items()}
ch02.errors(found, decays, sizes)

# %% [markdown]
# *Largest error over largest result. Left, the textbook: it loses all, suddenly. Right, what this chapter is about to
# build.*
#
# ViG's own gates are near −0.04, and C = 64 would be safe on average. But a gate is computed from data: one strong
# gate in one channel is enough, and a reset, $g = -\infty$, is a legal gate. Putting the zero of $b$ into the middle
# of the chunk doubles the limit and keeps the failure. What repairs it is never to form a positive exponent:
#
# > **The rule.** Between $j$ and $i$ choose a *boundary*. Let one factor decay from $j$ to the boundary, the other
# > from the boundary to $i$. Both exponents are sums of gates, so both are ≤ 0, and both factors are in [0, 1].
#
# A chunk's edge is such a boundary for all pairs in different chunks. Inside a chunk we shall find others.
#
# ## Chunks: four steps
#
# Cut T tokens into N chunks of C. A pair inside one chunk is met directly (step 1); a pair in two chunks meets through
# the state at the edges between them (steps 2 to 4).

# %%
ch02.steps(C=16, N=3, K=4, V=6)

# %% [markdown]
# *The four steps on our tensors. Only step 3 goes from chunk to chunk, N times instead of T times.*

# %%
N = T // C
q, k, v, g = (t.unflatten(0, (N, C)) for t in (q, k, v, g))  # [N, C, K or V]
print([list(t.shape) for t in (q, k, v, g)])

# %% [markdown]
# ### Step 1. Inside a chunk
#
# For the moment by `pairs`, chunk by chunk. What should come out? The loop, if it forgot everything at each chunk's
# first token: a reset. The naive layer takes a gate of −∞ as it is, so we can test a step alone.

# %%
o_inside = pairs(q, k, v, g)[1]  # [N, C, V]
g_reset = g.clone()
g_reset[:, 0] = -inf  # each chunk begins with an empty memory
o_reset, states_reset = loop(*(t.flatten(0, 1) for t in (q, k, v, g_reset)))
equal("step 1 = loop with resets", o_inside.flatten(0, 1), o_reset)

# %% [markdown]
# ### Step 2. What each chunk alone adds to the state
#
# At the chunk's far edge, token $j$'s pair has faded by all gates met *after* $j$:
#
# $$S_\text{own} = \sum_j \left( k_j \odot e^{g_{j+1} + \dots + g_{C-1}} \right)^\top v_j$$
#
# **Exercise 1.** Write those exponents. It is tempting to subtract: `total - b`. Think of a chunk with a reset in it.


# %%
def decay_from(g):
    """Log decay from token j to the end of its chunk, its own gate excluded: g_j+1 + ... + g_C-1.

    g: [..., C, K] from -inf to 0. Returns [..., C, K]; the last row is 0.
    """
    ...  # your turn


check(decay_from)

# %%
S_own = (k * torch.exp(chunks.decay_from(g, reverse=False))).mT @ v  # [N, K, C] @ [N, C, V] = [N, K, V]
equal("step 2 = state of the loop with resets", S_own, states_reset[C - 1 :: C])

# %% [markdown]
# ### Step 3. The state that enters each chunk
#
# Equation 5 again, one step a chunk. `total` is the log decay over a whole chunk.

# %%
total = g.sum(1)[..., None]  # [N, K, 1]
S, S_in = torch.zeros(K, V, dtype=v.dtype), []
for n in range(N):
    S_in.append(S)
    S = torch.exp(total[n]) * S + S_own[n]
S_in = torch.stack(S_in)  # [N, K, V]
equal("step 3 = states of the loop at the edges", S_in[1:], states[C - 1 : -1 : C])

# %% [markdown]
# **Exercise 2.** The reverse scan carries the state from the last chunk to the first. Which state enters which chunk?


# %%
def states_entering(S_own, total):
    """S_in of a scan from the last chunk to the first.

    S_own: [N, K, V], what each chunk adds to the state at its left edge. total: [N, K], log decay over each chunk.
    Returns S_in [N, K, V]: what enters each chunk from the right; S_in[N-1] is 0.
    """
    ...  # your turn


check(states_entering)

# %% [markdown]
# ### Step 4. Across chunks
#
# Each token reads the state that entered its chunk, decayed down to the token, its own gate included: $b_i$, which the
# library calls `decay_to`.

# %%
o_across = (q * torch.exp(chunks.decay_to(g, reverse=False))) @ S_in  # [N, C, K] @ [N, K, V] = [N, C, V]
equal("steps 1 + 4 = loop", (o_inside + o_across).flatten(0, 1), o_loop)

# %% [markdown]
# Every exponent of steps 2 to 4 is a sum of gates. What is left is the cube of step 1.
#
# ## Inside a chunk: halving
#
# The same trick, again and again. Split a chunk in the middle: the middle is a boundary for all pairs with $j$ in the
# early half and $i$ in the late half, and they meet in one matrix product. The pairs inside each half are left; split
# those. After $\log_2 C$ levels every pair has met exactly once.

# %%
ch02.pairs(T=24, C=8)

# %% [markdown]
# *Which step computes which pair: blue inside a chunk, darker for smaller blocks; orange through the state.*
#
# Step through the same picture, with its states: **[a chunk and its state](../docs/animations/chunk.html)** (a page
# that needs no network).


# %%
def level(q, k, v, g, half):
    """In every block of 2 * half tokens the late half reads the early half. [..., C, K] -> [..., C, V]"""
    q, k, v, g = (t.unflatten(-2, (-1, 2, half)) for t in (q, k, v, g))  # [..., blocks, 2, half, K]
    q_late = q[..., 1, :, :] * torch.exp(chunks.decay_to(g[..., 1, :, :], reverse=False))  # from the middle to i
    k_early = k[..., 0, :, :] * torch.exp(chunks.decay_from(g[..., 0, :, :], reverse=False))  # from j to the middle
    o_late = (q_late @ k_early.mT) @ v[..., 0, :, :]  # A v, with A: [..., blocks, half, half]
    return torch.stack([torch.zeros_like(o_late), o_late], dim=-3).flatten(-4, -2)


def intra_chunk(q, k, v, g):
    o = (q * k).sum(-1, keepdim=True) * v  # i = j: no gate in between
    return o + sum(level(q, k, v, g, half=2**n) for n in range((q.shape[-2] - 1).bit_length()))


equal("halving = pairs", intra_chunk(q, k, v, g), o_inside)
equal("halving = the library's intra_chunk", intra_chunk(q, k, v, g), chunks.intra_chunk(q, k, v, g, reverse=False))

# %% [markdown]
# **Exercise 3.** At which level do two tokens meet? Neighbours need not meet early.


# %%
def met_with_half(i: int, j: int) -> int:
    """The `half` of the level at which tokens i > j of a chunk meet: 1, 2, 4, ... ; 0 if i == j."""
    ...  # your turn


check(met_with_half)

# %% [markdown]
# ### For every gate
#
# Now the promise. The textbook gave up at g = −8. Halving, in float32, with gates up to a full reset, against the
# loop:

# %%
for gate in (-0.04, -8.0, -100.0, -inf):
    y = [t[0, 0] for t in tolerance.draw(B=1, H=1, T=16, K=32, V=64)]
    gates = torch.where(torch.arange(32) % 2 == 0, gate, -0.04).expand(16, 32)  # every second channel
    right = loop(*(t.double() for t in (*y[:3], gates)))[0]
    for name, way in (("textbook", textbook), ("halving", intra_chunk)):
        error = (way(*y[:3], gates) - right).abs().max() / right.abs().max()
        print(f"g = {gate:6} in every second channel, {name:8}: error {error:.0e}")

# %% [markdown]
# A reset costs nothing: $e^{-\infty} = 0$ is exact, and since sums are never subtracted, $-\infty - (-\infty)$, which
# is NaN, never appears. That is why `decay_from` adds the gates after $j$ instead of taking `total - b`.
#
# ## The chunk size changes nothing
#
# C decides in which order the sums are formed, not what is summed. So results may differ by rounding, and by nothing
# else, for *any* C, dividing T or not (the library pads the last chunk with k = 0 and g = 0: adds nothing, forgets
# nothing). In float64, where rounding is near 1e-16:

# %%
for C in (1, 2, 7, 16, 48, 100):
    o = chunks.gla(x.q, x.k, x.v, x.g_fwd, reverse=False, scale=1.0, chunk_size=C)[0, 0]
    print(f"C = {C:3}: largest difference from the loop {(o - o_loop).abs().max():.0e} of {o_loop.abs().max():.1f}")

# %% [markdown]
# A result that moved with C would be a bug at a chunk's edge. The tests of `vig_ref` use this as one of several [laws
# that need no oracle](../docs/verification.md).
#
# ## Count, predict, measure
#
# **Exercise 4.** How many elements does one head move if the state goes to memory once per chunk?


# %%
def elements(T: int, K: int, V: int, C: int) -> int:
    """Elements read and written: q, k, g, v and o once a token, the state read and written once a chunk, the last
    chunk perhaps not full. C = 1 is the loop.
    """
    ...  # your turn


check(elements)

# %%
sizes = [1, 2, 4, 8, 16, 32, 64, 128, 256]
ch02.moved(sizes, inputs, state / torch.tensor(sizes))

# %% [markdown]
# *Elements moved a token in ViG-T. From C = 32 on, the inputs themselves are most of it: a larger chunk has little
# left to save.*
#
# That is what an ideal kernel moves. PyTorch moves more, since every operation writes its result to memory and the
# next one reads it back. We need not guess: a dispatch mode sees every operation, and can count.


# %%
class Count(TorchDispatchMode):
    """Operations, and the elements that they read and write; a view moves nothing, and still is an operation."""

    operations = elements = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.operations += 1
        if not operation.is_view:
            tensors = [t for t in tree_leaves((args, kwargs, result)) if torch.is_tensor(t)]
            self.elements += sum(t.numel() for t in tensors)
        return result


# %%
big = tolerance.draw(B=1, H=3, T=1024, K=32, V=64)  # an image of 512 x 512 in ViG-T: T = 32 x 32 patches
sizes = [4, 8, 16, 32, 64, 128, 256, 512]
runs = {"loop": lambda: naive.gla(big.q, big.k, big.v, big.g_fwd, reverse=False, scale=1.0)}
for C in sizes:
    runs[C] = lambda C=C: chunks.gla(big.q, big.k, big.v, big.g_fwd, reverse=False, scale=1.0, chunk_size=C)

counts = {}
for name, run in runs.items():
    with Count() as counts[name]:
        run()
for name in ("loop", 16, 64, 256):
    print(f"{name!s:>4}: {counts[name].operations:5} operations, {counts[name].elements / 1e6:6.1f} million elements")

# %% [markdown]
# **Predict.** A simple model of this machine: an operation costs a fixed overhead, and every element moved a little
# more. Both can be measured with one operation that is tiny and one that is large.


# %%
def seconds(run, repeats=7):
    """This process' time on its one core, the shortest of several runs: what else runs disturbs that least."""
    found = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return min(found)


tiny, large = torch.ones(1), torch.ones(4_000_000)
overhead = seconds(lambda: [tiny + tiny for _ in range(1000)]) / 1000
an_element = seconds(lambda: large + large) / (3 * large.numel())
print(f"an operation: {overhead * 1e6:.1f} µs; an element: {an_element * 1e9:.2f} ns")
predicted = {name: c.operations * overhead + c.elements * an_element for name, c in counts.items()}
print(f"predicted: loop {predicted['loop'] * 1e3:.0f} ms, C = 64 {predicted[64] * 1e3:.1f} ms, "
      f"{predicted['loop'] / predicted[64]:.0f} times faster")  # fmt: skip

# %% [markdown]
# **Measure.**

# %%
measured = {name: seconds(run) for name, run in runs.items()}
print(f"measured: loop {measured['loop'] * 1e3:.0f} ms, C = 64 {measured[64] * 1e3:.1f} ms, "
      f"{measured['loop'] / measured[64]:.0f} times faster")  # fmt: skip
ch02.times(sizes, [predicted[C] for C in sizes], [measured[C] for C in sizes], (predicted["loop"], measured["loop"]))

# %% [markdown]
# *Predicted and measured. Small chunks pay for many steps, large ones for wide levels of halving; between them lies a
# flat valley.*
#
# The model is crude: it knows nothing of arithmetic, of caches, or of what else this machine was doing, and your
# numbers will differ. It comes nearer for the loop, which is almost nothing but overhead, and is too hopeful for the
# chunks, where the arithmetic that it leaves out is a good part of the time. It is good for one thing, and that is
# what a prediction is for: it says *why* chunks win. Not because they compute less, which with C = 64 they do not.
# The loop multiplies 3KV times a token (fade, write, read); chunks 2KV times to write and read the state, KV/C times
# to fade it, and (C − 1)/2 · (K + V) times to meet the pairs inside:

# %%
K, V = 32, 64
print(f"multiplications a token: loop {3 * K * V}")
for C in (16, 64, 256):
    print(f"C = {C:3}: {2 * K * V + K * V / C + (C - 1) / 2 * (K + V):.0f}")

# %% [markdown]
# They win because T small steps in a row became N larger ones, and because the state moves once a chunk. On a GPU the
# same counts decide, with its memory in place of ours; that is [chapter 3](03_one_kernel_two_directions.ipynb).
#
# ## The other direction, and the three layers
#
# The reverse scan is the same four steps with "earlier" on the right: `decay_to` sums from the right, `decay_from`
# from the left, the late half of a block is its left half, chunks are carried from the last to the first. q, k and v
# are never turned round; in the library, `reverse` is an argument of those two small functions. With both directions,
# Equation 6:

# %%
exact = vig_ref.bidirectional_gla(*(t.double() for t in x[:5]), backend="naive")
for backend in LAYERS:
    equal(f"{backend:7} = Eq. 6 in float64", vig_ref.bidirectional_gla(*x[:5], backend=backend), exact)

# %% [markdown]
# ## Common mistakes
#
# All but the last are planted in [`tests/mutants.py`](../tests/mutants.py), where the test suite must find each.
#
# | mistake | what you see |
# |---|---|
# | **`total - b` instead of a sum of what follows** | Right for mild gates, digits lost for strong ones, NaN after a reset. |
# | **A token's own gate in `decay_from`, or not in `decay_to`** | Everything off by one gate, with ViG's gates about 5 %. A loose tolerance lets it pass. |
# | **The state stored after its own chunk** | A token reads its own chunk twice, also what comes after it. The first chunk is wrong, which gives it away. |
# | **Halving stops one level early** | The two halves of a chunk do not see each other. With strong gates hardly anything changes: test gates that keep. |
# | **Padding that forgets** | The library pads every chunk to a power of two with g = 0, *in logarithm*. With −1 there the state fades once more at every edge, unless C is a power of two: test C = 7. |
# | **`N = T // C`** | The last tokens vanish unless C divides T. Test T = 17, not T = 16. |
# | **Testing with mild gates only** | The textbook's way passes every test that never forgets. |
#
# Plant one and look. A gate too many in `decay_from`, with ViG's own gates:

# %%
y = tolerance.draw(B=1, H=1, T=16, K=32, V=64)
S_right = (y.k * torch.exp(chunks.decay_from(y.g_fwd, False))).mT @ y.v
S_wrong = (y.k * torch.exp(chunks.decay_to(y.g_fwd, True))).mT @ y.v  # its own gate included
print(f"off by {(S_wrong - S_right).norm() / S_right.norm():.1%}, and no error message")

# %% [markdown]
# ## Summary
#
# - Unrolled, a scan is a lower triangular matrix $A$ times $v$, with
#   $A_{ij} = q_i \cdot (k_j \odot e^{g_{j+1} + \dots + g_i})$.
# - $e^{b_i} e^{-b_j}$ overflows once a chunk forgets $e^{88}$ in float32. Let both factors decay towards a boundary
#   between $j$ and $i$, and no exponent is ever positive; a reset is then one gate among others.
# - Four steps: `intra_chunk`; `S_own`; `S_in`, with `total`; and the reading across. The boundaries are the chunks'
#   edges, and inside a chunk the middles of blocks of 2, 4, 8, ...
# - The chunk size changes speed and rounding, never the result.
# - The state moves once a chunk instead of once a token, and T steps in a row become N.
#
# PyTorch still writes every intermediate result to memory. One kernel can keep them on the chip, for both directions
# at once: [chapter 3, One kernel, two directions](03_one_kernel_two_directions.ipynb).
