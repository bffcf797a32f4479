"""Checkers of chapter 2."""

import torch
import torch.nn.functional as F

from exercises import NotYet, exercise, expect, wrong
from vig_ref.chunked import chunks

# --- 1 ---------------------------------------------------------------------------------------------------------------


@exercise
def decay_from(answer):
    g = -torch.tensor([[1.0, 2.0], [3.0, 0.5], [0.25, 4.0], [2.0, 1.0]], dtype=torch.float64)
    expect(
        answer(g),
        chunks.decay_from(g, False),
        "decay_from(g)",
        likely={
            "the token's own gate is in it; its pair is written after that gate.": chunks.decay_to(g, True),
            "that is decay_to: from the chunk's beginning to the token.": chunks.decay_to(g, False),
            "that is the decay from the other edge, what a reverse scan needs.": chunks.decay_from(g, True),
            "these are factors; the function returns their logarithms.": chunks.decay_from(g, False).exp(),
        },
    )
    expect(answer(g[None, None]), chunks.decay_from(g, False)[None, None], "decay_from(g) with leading dimensions")
    g[2, 0] = -torch.inf
    got = torch.as_tensor(answer(g))
    if got.isnan().any():
        raise NotYet(
            "decay_from(g) is NaN where a gate is -inf: -inf minus -inf has no value. Add up the gates that follow j, "
            "instead of subtracting a sum from another."
        )
    expect(got, chunks.decay_from(g, False), "decay_from(g) with a reset")


@wrong(decay_from, "subtracts sums", says="NaN where a gate is -inf")
def _(g):
    return g.sum(-2, keepdim=True) - g.cumsum(-2)


@wrong(decay_from, "includes the token's own gate", says="own gate is in it")
def _(g):
    return g.flip(-2).cumsum(-2).flip(-2)


@wrong(decay_from, "sums from the wrong side", says="decay_to")
def _(g):
    return g.cumsum(-2)


@wrong(decay_from, "sums over the wrong axis if there is a batch", says="leading dimensions")
def _(g):
    return F.pad(g[..., 1:, :], (0, 0, 0, 1)).flip(0).cumsum(0).flip(0) if g.dim() == 2 else g * 0


# --- 2 ---------------------------------------------------------------------------------------------------------------


def _carry(S_own, total, *, order, before):
    S, S_in = torch.zeros_like(S_own[0]), [S_own[0]] * len(S_own)
    for n in order:
        after = torch.exp(total[n])[:, None] * S + S_own[n]
        S_in[n] = S if before else after
        S = after
    return torch.stack(S_in)


@exercise
def states_entering(answer):
    r = torch.Generator().manual_seed(2)
    N, K, V = 4, 3, 5
    S_own = torch.randn(N, K, V, generator=r, dtype=torch.float64)
    total = -torch.rand(N, K, generator=r, dtype=torch.float64)
    back, forth = range(N - 1, -1, -1), range(N)
    expect(
        answer(S_own, total),
        _carry(S_own, total, order=back, before=True),
        "states_entering(S_own, total)",
        likely={
            "that is the scan from the first chunk; begin at the last.": _carry(S_own, total, order=forth, before=True),
            "chunk n's own contribution is in S_in[n]: note the state before you update it.": (
                _carry(S_own, total, order=back, before=False)
            ),
            "total is a logarithm: the state fades by its exponential.": (
                _carry(S_own, total.abs().log() + torch.pi * 1j, order=back, before=True).real
            ),
            "the state does not fade on its way through a chunk.": (
                _carry(S_own, total * 0, order=back, before=True)
            ),
            "the state fades by the wrong chunk's total: passing chunk n, it fades by total[n].": (
                _carry(S_own, total.roll(1, 0), order=back, before=True)
            ),
        },
    )


@wrong(states_entering, "carries from the first chunk", says="begin at the last")
def _(S_own, total):
    return _carry(S_own, total, order=range(len(S_own)), before=True)


@wrong(states_entering, "stores the state after its own chunk", says="before you update")
def _(S_own, total):
    return _carry(S_own, total, order=range(len(S_own) - 1, -1, -1), before=False)


@wrong(states_entering, "never fades the state", says="does not fade")
def _(S_own, total):
    return torch.flip(S_own.flip(0).cumsum(0), (0,)) - S_own


@wrong(states_entering, "fades by the total itself", says="logarithm")
def _(S_own, total):
    S, S_in = torch.zeros_like(S_own[0]), torch.empty_like(S_own)
    for n in reversed(range(len(S_own))):
        S_in[n] = S
        S = total[n][:, None] * S + S_own[n]
    return S_in


@wrong(states_entering, "gates the columns", says="raised RuntimeError")
def _(S_own, total):
    S, S_in = torch.zeros_like(S_own[0]), torch.empty_like(S_own)
    for n in reversed(range(len(S_own))):
        S_in[n] = S
        S = torch.exp(total[n]) * S + S_own[n]
    return S_in


# --- 3 ---------------------------------------------------------------------------------------------------------------


@exercise
def met_with_half(answer):
    for i, j in ((1, 0), (3, 2), (2, 1), (5, 3), (8, 7), (13, 12), (15, 0), (6, 6)):
        half = 1
        while i // (2 * half) != j // (2 * half):  # the smallest block that holds both
            half *= 2
        got, want = answer(i, j), half if i != j else 0
        if got != want:
            block = f"the smallest block of 2, 4, 8, ... tokens that holds both has {2 * half} tokens" if i != j else ""
            raise NotYet(
                f"met_with_half({i}, {j}): expected {want}, got {got}; {block or 'a token meets itself at no level'}. "
                "Blocks begin at multiples of their length, whatever the distance of the tokens."
            )


@wrong(met_with_half, "goes by the distance", says=r"met_with_half\(2, 1\): expected 2, got 1; the smallest block")
def _(i, j):
    return 1 << ((i - j).bit_length() - 1) if i != j else 0


@wrong(met_with_half, "returns the block, not its half", says="expected 1, got 2")
def _(i, j):
    return 1 << (i ^ j).bit_length() if i != j else 0


@wrong(met_with_half, "gives the diagonal a level", says="a token meets itself at no level")
def _(i, j):
    return max(1, (1 << (i ^ j).bit_length()) >> 1)


# --- 4 ---------------------------------------------------------------------------------------------------------------


@exercise
def elements(answer):
    for T, K, V, C in ((1000, 32, 64, 50), (196, 32, 64, 1), (196, 32, 64, 64), (17, 3, 5, 16)):
        inputs, N = T * (3 * K + 2 * V), -(-T // C)
        expect(
            float(answer(T, K, V, C)),
            float(inputs + 2 * N * K * V),
            f"elements(T={T}, K={K}, V={V}, C={C})",
            rtol=0,
            likely={
                "the last chunk is missing: C need not divide T.": float(inputs + 2 * (T // C) * K * V),
                "the state is both read and written.": float(inputs + N * K * V),
                "the state is counted once a token; it moves once a chunk.": float(inputs + 2 * T * K * V),
                "o is missing: v is read and o is written, V elements each.": float(inputs - T * V + 2 * N * K * V),
                "the gates g are missing: K elements a token.": float(inputs - T * K + 2 * N * K * V),
                "number of chunks times inputs of a whole chunk: the last chunk may be shorter.": (
                    float(N * C * (3 * K + 2 * V) + 2 * N * K * V)
                ),
            },
        )


@wrong(elements, "drops the last chunk", says="C need not divide T")
def _(T, K, V, C):
    return T * (3 * K + 2 * V) + T // C * 2 * K * V


@wrong(elements, "counts the state once", says="both read and written")
def _(T, K, V, C):
    return T * (3 * K + 2 * V) + -(-T // C) * K * V


@wrong(elements, "forgets the result", says="o is missing")
def _(T, K, V, C):
    return T * (3 * K + V) + -(-T // C) * 2 * K * V


@wrong(elements, "forgets the gates", says="gates g are missing")
def _(T, K, V, C):
    return T * (2 * K + 2 * V) + -(-T // C) * 2 * K * V


@wrong(elements, "moves the state with every token", says="once a token")
def _(T, K, V, C):
    return T * (3 * K + 2 * V) + T * 2 * K * V
