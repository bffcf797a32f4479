"""Solutions of chapter 6, what ViG sees."""

import torch


def forward_map(q, k, g, i, scale):
    """The exponent is the sum of the gates up to i, less the sum up to j; later tokens are not met yet."""
    b = g.cumsum(0)
    row = torch.zeros(len(k), dtype=k.dtype)
    row[: i + 1] = scale * (q[i] * k[: i + 1] * torch.exp(b[i] - b[: i + 1])).sum(-1)
    return row


def smallest_share(field, share):
    """The brightest pixels first, until their sum is enough."""
    sums = field.flatten().sort(descending=True).values.double().cumsum(0)
    return (int((sums < share * sums[-1]).sum()) + 1) / field.numel()


def most_read(A_fwd, A_rev, n):
    """Column sums of the magnitudes of the merged map, without the diagonal."""
    A = (A_fwd + A_rev).abs()
    A = A - torch.diag_embed(torch.diagonal(A, dim1=1, dim2=2))
    return A.sum(dim=(0, 1)).topk(n).indices
