"""Checkers of chapter 6, what ViG sees."""

import torch
import torch.nn.functional as F

from exercises import NotYet, exercise, expect, wrong
from vig_ref import see


@exercise
def forward_map(answer):
    r = torch.Generator().manual_seed(0)
    q, k, g = torch.randn(3, 9, 4, generator=r, dtype=torch.float64)
    g = F.logsigmoid(g)

    def weights(i, b):
        """With b_i - b_j as the exponent of the decay."""
        row = 0.3 * (q[i] * k * torch.exp(b[i] - b)).sum(-1)
        return torch.where(torch.arange(9) <= i, row, 0.0)

    b = g.cumsum(0)
    before = b - g  # without a token's own gate
    for i in (0, 5, 8):
        A = see.attention_matrix(*(x[None, None] for x in (q, k, g)), reverse=False, scale=0.3)[0, 0]
        ahead = 0.3 * (q[i] * k * torch.exp(b[i] - b)).sum(-1)
        expect(
            answer(q, k, g, i, 0.3), A[i], f"row {i}", rtol=1e-8,
            likely={
                "the tokens after i are not met yet: their weight is 0.": ahead,
                "one gate too early: token i's own gate counts, and token j's own does not.": weights(i, before),
                "the factor `scale` is missing.": A[i] / 0.3,
                "no decay at all: each pair is faded by the gates in between.":
                    torch.where(torch.arange(9) <= i, 0.3 * k @ q[i], 0.0),
            },
        )  # fmt: skip


@wrong(forward_map, "forgets that the scan is causal", says="not met yet")
def _(q, k, g, i, scale):
    b = g.cumsum(0)
    return scale * (q[i] * k * torch.exp(b[i] - b)).sum(-1)


@wrong(forward_map, "fades by the gate of token j itself", says="one gate too early")
def _(q, k, g, i, scale):
    b = g.cumsum(0) - g
    row = scale * (q[i] * k * torch.exp(b[i] - b)).sum(-1)
    return torch.where(torch.arange(len(k)) <= i, row, 0.0)


@wrong(forward_map, "forgets the gates", says="no decay")
def _(q, k, g, i, scale):
    return torch.where(torch.arange(len(k)) <= i, scale * k @ q[i], 0.0)


@exercise
def smallest_share(answer):
    field = torch.rand(20, 30, generator=torch.Generator().manual_seed(0)) ** 8
    ascending = field.flatten().sort().values.double().cumsum(0)
    for share in (0.5, 0.9):
        expect(
            answer(field, share), see.share_of_pixels(field, share), f"a random field, share {share}",
            likely={
                "it must hold *at least* the share; one pixel too few.":
                    see.share_of_pixels(field, share) - 1 / 600,
                "that is the largest such part; begin with the brightest pixels.":
                    (int((ascending < share * ascending[-1]).sum()) + 1) / 600,
                "that counts pixels above a share of the *maximum*; the sum is asked for.":
                    (field > share * field.max()).double().mean(),
            },
        )  # fmt: skip
    small = torch.tensor([[3.0, 1.0], [1.0, 1.0]])
    for share, right in ((0.5, 0.25), (0.51, 0.5), (1.0, 1.0)):
        expect(
            answer(small, share), right, f"smallest_share([[3, 1], [1, 1]], {share})",
            likely={
                "it must hold *at least* the share; one pixel too few.": right - 0.25,
                "one pixel too many: exactly the share is enough.": right + 0.25,
            },
        )  # fmt: skip


@wrong(smallest_share, "begins with the darkest pixels", says="brightest")
def _(field, share):
    sizes = field.flatten().sort().values.double().cumsum(0)
    return (int((sizes < share * sizes[-1]).sum()) + 1) / field.numel()


@wrong(smallest_share, "counts one pixel too few", says="too few")
def _(field, share):
    sizes = field.flatten().sort(descending=True).values.double().cumsum(0)
    return int((sizes < share * sizes[-1]).sum()) / field.numel()


@wrong(smallest_share, "compares with the maximum", says="maximum")
def _(field, share):
    return (field > share * field.max()).double().mean()


@exercise
def most_read(answer):
    r = torch.Generator().manual_seed(0)
    A = torch.randn(2, 2, 7, 7, generator=r) * torch.linspace(0.3, 1.5, 7)
    A_fwd, A_rev = A[0].tril(), A[1].triu()
    A_fwd.diagonal(dim1=1, dim2=2)[:, 1] += 30  # a token that reads itself and is hardly read by others
    merged = (A_fwd + A_rev).abs() * (1 - torch.eye(7))
    right = merged.sum((0, 1)).topk(3).indices
    got = torch.as_tensor(answer(A_fwd.clone(), A_rev.clone(), 3))
    if got.is_floating_point():
        raise NotYet(f"most_read: expected indices, integers, got {got.dtype}; topk returns values and indices.")
    expect(
        got, right, "the three most-read of seven tokens", rtol=0, atol=0,
        likely={
            "the diagonal is in it: how much a token reads itself is not asked for.":
                (A_fwd + A_rev).abs().sum((0, 1)).topk(3).indices,
            "those are the tokens that read most; sum over the readers, axis 1, not over what they read.":
                merged.sum((0, 2)).topk(3).indices,
            "signs cancel: a weight of -1 is read as much as one of 1.":
                ((A_fwd + A_rev) * (1 - torch.eye(7))).sum((0, 1)).topk(3).indices,
            "those are the least-read.": merged.sum((0, 1)).topk(3, largest=False).indices,
        },
    )  # fmt: skip


@wrong(most_read, "leaves the diagonal in", says="diagonal")
def _(A_fwd, A_rev, n):
    return (A_fwd + A_rev).abs().sum((0, 1)).topk(n).indices


@wrong(most_read, "sums the wrong axis", says="sum over the readers")
def _(A_fwd, A_rev, n):
    A = (A_fwd + A_rev).abs()
    return (A - torch.diag_embed(A.diagonal(dim1=1, dim2=2))).sum((0, 2)).topk(n).indices


@wrong(most_read, "lets signs cancel", says="signs cancel")
def _(A_fwd, A_rev, n):
    A = A_fwd + A_rev
    return (A - torch.diag_embed(A.diagonal(dim1=1, dim2=2))).sum((0, 1)).topk(n).indices


@wrong(most_read, "returns the sums", says="indices")
def _(A_fwd, A_rev, n):
    return (A_fwd + A_rev).abs().sum((0, 1)).topk(n).values
