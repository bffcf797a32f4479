"""Solutions of chapter 3."""

import torch
import triton
import triton.language as tl

from vig_ref.fused.blocks import LOG2E, C, ahead, chunk, dot, load, sequence, store, sums


def middle_matrix(C: int, reverse: bool):
    i, t, middle = torch.arange(C)[:, None], torch.arange(C), C // 2
    if reverse:
        faded, ahead = (i <= t) & (t < middle), (middle <= t) & (t < i)
    else:
        faded, ahead = (middle <= t) & (t <= i), (i < t) & (t < middle)
    return faded.float() - ahead.float()


@triton.jit
def reverse_kernel(q, k, v, g, o, H, T, K, V, BK: tl.constexpr, BV: tl.constexpr):
    i_b, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    q, k, g = sequence(q, i_b, i_h, 0), sequence(k, i_b, i_h, 0), sequence(g, i_b, i_h, 0)
    v, o = sequence(v, i_b, i_h, 0), sequence(o, i_b, i_h, 0)
    reads = tl.arange(0, C)[:, None] >= tl.arange(0, C)[None, :]
    S = tl.zeros((BV, BK), tl.float32)
    N = tl.cdiv(T, C)
    for i in range(N):
        at = chunk(N - 1 - i, -1)  # from the last chunk to the first, and each from its last token to its first
        b_q, b_k, b_v = load(q, at, T, K, BK), load(k, at, T, K, BK), load(v, at, T, V, BV)
        b_g = load(g, at, T, K, BK) * LOG2E
        b = sums(ahead(True, True), b_g, "ieee")
        A = dot(b_q * tl.exp2(b), tl.trans(b_k * tl.exp2(-b)), tl.zeros((C, C), tl.float32), "ieee")
        b_o = dot(b_q * tl.exp2(b), tl.trans(S), tl.zeros((C, BV), tl.float32), "ieee")
        b_o = dot(tl.where(reads, A, 0.0), b_v, b_o, "ieee")
        b_kE = b_k * tl.exp2(sums(ahead(False, False), b_g, "ieee"))
        S = dot(tl.trans(b_v), b_kE, tl.exp2(tl.sum(b_g, 0))[None, :] * S, "ieee")
        store(o, b_o, at, T, V)


def reverse_in_chunks(q, k, v, g):
    B, H, T, K = q.shape
    V, o = v.shape[3], torch.full_like(v, torch.nan)
    tensors = [(x, *x.stride()) for x in (q, k, v, g, o)]
    BK, BV = (max(16, triton.next_power_of_2(n)) for n in (K, V))
    reverse_kernel[(B * H,)](*tensors, H, T, K, V, BK=BK, BV=BV)
    return o


def then(total_1, S_1, total_2, S_2):
    return total_1 + total_2, torch.exp(total_2)[:, None] * S_1 + S_2


def least_bytes(K: int, V: int, gate: int) -> int:
    return 2 * (K + K + V + V) + gate * (K + K)  # q, k, v, o; g_fwd, g_rev
