"""Checkers of chapter 5, from an image to logits."""

import torch
import torch.nn.functional as F

from exercises import NotYet, exercise, expect, wrong
from vig_ref.model import PatchEmbed, RMSNorm


def _pair(got, name: str) -> list:
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        raise NotYet(f"{name}: expected a pair, got {got!r}.")
    return list(got)


def _pixel_rows(r: int, patch_size: int) -> list[int]:
    """The first and the last pixel row that matters for a token, by the gradient."""
    torch.manual_seed(0)
    embed = PatchEmbed(4, patch_size, 1)
    pixels = torch.randn(1, 1, patch_size * (r + 2), patch_size * 2, requires_grad=True)
    embed(pixels)[0, r, 1, 0].backward()
    assert pixels.grad is not None
    (rows,) = pixels.grad[0, 0].any(dim=1).nonzero(as_tuple=True)
    return [int(rows.min()), int(rows.max())]


@exercise
def pixels_of_token(answer):
    for r, p in ((7, 16), (5, 4), (3, 32), (6, 2)):
        name = f"pixels_of_token({r}, {p})"
        mine, right = _pair(answer(r, p), name), _pixel_rows(r, p)
        expect(
            mine, right, name, rtol=0, atol=0,
            likely={
                "this is the token's own patch; the two convolutions overlap, and it reads more.":
                    [p * r, p * r + p - 1],
                "both convolutions pad by 1; without padding every window would start so much later.":
                    [right[0] + p // 2 + 1, right[1] + p // 2 + 1],
                "the first kernel has at least 3 pixels, also when the stride is 1.": [right[0], right[1] - 1],
            },
        )  # fmt: skip


@wrong(pixels_of_token, "ignores the overlap", says="own patch")
def _(r, patch_size):
    return patch_size * r, patch_size * (r + 1) - 1


@wrong(pixels_of_token, "forgets the padding", says="pad by 1")
def _(r, patch_size):
    s = patch_size // 2
    return s * 2 * r, s * (2 * r + 2) + max(s + 1, 3) - 1


@wrong(pixels_of_token, "gives patch 2 a kernel of 2", says="at least 3")
def _(r, patch_size):
    s = patch_size // 2
    return patch_size * r - s - 1, patch_size * r + s + (s + 1) - 2


@exercise
def paper_gate(answer):
    torch.manual_seed(0)
    weight, bias, local = torch.randn(6, 6), torch.randn(6), torch.randn(5, 6)
    pair = _pair(answer(weight.clone(), bias.clone()), "paper_gate")
    for what, mine, right in zip(("weight", "bias"), pair, (weight, bias), strict=True):
        if getattr(mine, "shape", None) != right.shape:
            raise NotYet(f"{what}: expected a tensor {list(right.shape)}, got {getattr(mine, 'shape', type(mine))}.")
    z = F.linear(local, weight, bias)
    expect(
        torch.sigmoid(F.linear(local, *pair)), 1 - torch.sigmoid(z), "G_2D of five tokens",
        likely={
            "this is our gate, on the global branch; the paper's is the weight of the other one.": torch.sigmoid(z),
            "the bias must change too: the whole argument of the sigmoid changes its sign.":
                torch.sigmoid(F.linear(local, -weight, bias)),
            "1 - weight is not it: negate the argument of the sigmoid, not the gate's complement inside it.":
                torch.sigmoid(F.linear(local, 1 - weight, 1 - bias)),
        },
    )  # fmt: skip


@wrong(paper_gate, "negates the weight alone", says="bias must change")
def _(weight, bias):
    return -weight, bias


@wrong(paper_gate, "changes nothing", says="our gate")
def _(weight, bias):
    return weight, bias


@wrong(paper_gate, "takes the complement inside the sigmoid", says="not it")
def _(weight, bias):
    return 1 - weight, 1 - bias


@exercise
def same_norm_eps(answer):
    torch.manual_seed(0)
    o = 1e-3 * torch.randn(4, 8, dtype=torch.float64)
    for c, eps in ((0.5, 1e-6), (3.0, 1e-6), (0.5, 1e-5)):
        name = f"same_norm_eps({c}, {eps})"
        got = answer(c, eps)
        expect(
            got, eps / c**2, name, rtol=1e-9, atol=0,
            likely={
                "eps stands beside mean(o^2): a factor of o enters squared.": eps / c,
                "the other way round: where o is smaller than it should be, eps weighs more.": eps * c**2,
            },
        )  # fmt: skip
        one, two = (RMSNorm(8, eps=e).double() for e in (eps, float(got)))
        expect(two(o), one(c * o), f"RMSNorm(o, {name})", rtol=1e-12)


@wrong(same_norm_eps, "forgets the square", says="squared")
def _(c, eps):
    return eps / c


@wrong(same_norm_eps, "multiplies", says="other way round")
def _(c, eps):
    return eps * c**2


@exercise
def break_even_tokens(answer):
    for D, H in ((192, 3), (384, 6), (256, 2), (768, 4)):
        right = D / H + 16
        expect(
            answer(D, H), right, f"break_even_tokens({D}, {H})",
            likely={
                "this follows from the paper's 5Td^2, which holds for two heads.": D / 2 + 16,
                "the 32Td of the forget gates are missing.": D / H,
                "one T of 2T^2d is left when both sides are divided by T, and so is the factor 2.": 2 * right,
            },
        )  # fmt: skip


@wrong(break_even_tokens, "takes the paper's 5Td^2", says="two heads")
def _(D, H):
    return D / 2 + 16


@wrong(break_even_tokens, "leaves the gates out", says="forget gates")
def _(D, H):
    return D / H


@wrong(break_even_tokens, "loses the factor 2", says="factor 2")
def _(D, H):
    return 2 * D / H + 32
