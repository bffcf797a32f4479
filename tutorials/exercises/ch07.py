"""Checkers of chapter 7, the roadmap."""

import torch

from exercises import NotYet, exercise, expect, wrong
from vig_ref.model import ViGConfig
from vig_ref.roadmap import create_row


def _parameters(row: str, config: ViGConfig) -> int:
    with torch.device("meta"):
        model = create_row(row, config=config, backend="chunked")
    return sum(p.numel() for p in model.parameters())


@exercise
def added_by_2d_gate(answer):
    for D, H, depth in ((192, 3, 12), (384, 6, 12), (64, 2, 3)):
        config = ViGConfig(dim=D, num_heads=H, depth=depth)
        right = _parameters("gate_2d", config) - _parameters("direction_wise", config)
        expect(
            answer(D, H, depth), right, f"added_by_2d_gate({D}, {H}, {depth})", rtol=0, atol=0,
            likely={
                "that is one block; the model has `depth` of them.": 9 * D + D // H,
                "the projection of the 2D gate replaces that of the output gate; nothing is added for it.":
                    depth * (9 * D + D // H + D * D + D),
                "the norm of the local branch is missing.": depth * 9 * D,
                "depthwise: a channel has nine weights, and none for other channels.": depth * (9 * D * D + D // H),
                "the norm's weights are shared by the heads: V of them, not D.": depth * (9 * D + D),
            },
        )  # fmt: skip


@wrong(added_by_2d_gate, "adds the projection again", says="replaces")
def _(D, H, depth):
    return depth * (9 * D + D // H + D * D + D)


@wrong(added_by_2d_gate, "counts a full convolution", says="depthwise")
def _(D, H, depth):
    return depth * (9 * D * D + D // H)


@wrong(added_by_2d_gate, "counts one block", says="depth")
def _(D, H, depth):
    return 9 * D + D // H


def _reads(i: int, j: int, through: str, w: int) -> bool:
    near = abs(i // w - j // w) <= 1 and abs(i % w - j % w) <= 1
    return {"one scan": j <= i, "two scans": True, "local branch": near}[through]


@exercise
def can_read(answer):
    w = 5
    for through in ("one scan", "two scans", "local branch"):
        for i in range(20):
            for j in range(20):
                got, right = bool(answer(i, j, through, w)), _reads(i, j, through, w)
                if got == right:
                    continue
                hint = ""
                if through == "one scan":
                    hint = " A scan from the first token has met j by token i if j <= i, the token itself included."
                elif through == "local branch" and abs(i % w - j % w) == w - 1:
                    hint = " They are neighbours in the sequence, but at opposite ends of two rows of the grid."
                elif through == "local branch":
                    hint = f" Token i stands in row {i // w}, column {i % w}, token j in {j // w}, {j % w}."
                raise NotYet(f"can_read({i}, {j}, {through!r}, {w}): expected {right}, got {got}.{hint}")


@wrong(can_read, "takes distances in the sequence for distances on the grid", says="opposite ends|stands in row")
def _(i, j, through, w):
    near = abs(i - j) in (0, 1, w - 1, w, w + 1)
    return {"one scan": j <= i, "two scans": True, "local branch": near}[through]


@wrong(can_read, "lets a scan read what comes later", says="has met j")
def _(i, j, through, w):
    return _reads(j, i, through, w)


@wrong(can_read, "forgets that a token reads itself", says="itself included")
def _(i, j, through, w):
    return j < i if through == "one scan" else _reads(i, j, through, w)


@exercise
def images_needed(answer):
    for p, d in ((0.752, 0.002), (0.9, 0.01), (0.5, 0.1)):
        right = 8 * p * (1 - p) / d**2
        expect(
            answer(p, d), right, f"images_needed({p}, {d})",
            likely={
                "that is for one model; the variance of a difference is the sum of both.": right / 2,
                "that makes d one standard error; two are asked for.": right / 4,
                "the standard errors were added; variances add.": 2 * right,
                "d enters squared: half the difference needs four times the images.": right * d,
            },
        )  # fmt: skip


@wrong(images_needed, "counts one model", says="sum of both")
def _(p, d):
    return 4 * p * (1 - p) / d**2


@wrong(images_needed, "adds the standard errors", says="variances add")
def _(p, d):
    return 16 * p * (1 - p) / d**2


@wrong(images_needed, "takes one standard error", says="two are asked")
def _(p, d):
    return 2 * p * (1 - p) / d**2
