"""Writes what the page explorer.md shows: `python docs/explorer/precompute.py` makes china.jpg and data.js beside it.

One head over a real photograph. It is designed, not trained, so that its maps can be understood: a query and a key are
the patch itself, shrunk to 3x3 pixels, so that a token looks for patches like its own; each scan's gate is a random
projection of the same numbers, made slower or faster by tau, the temperature of Eq. 6.

    f[t]        = patch t as 27 numbers, each standardised over the image
    q[t] = k[t] = f[t] / |f[t]|
    g_fwd[t]    = logsigmoid(f[t] W_fwd) / tau,   g_rev likewise

The maps are `vig_ref.see.attention_matrix`. They are stored as bytes, row by row: a weight is its byte times the row's
scale. Both directions share one matrix `[T, T]`, since A_fwd lies below the diagonal and A_rev above it; on the
diagonal, where they are equal, stands their sum. A sum of rounded weights would be off by many roundings, so the sums
that the page shows are stored too, `[2, T]`: of |A_fwd| and |A_rev| over the other tokens.
"""

import base64
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor

from vig_ref.see import attention_matrix

HERE = Path(__file__).parent
SIZE, PATCH = 224, 16
GRID = SIZE // PATCH
TAUS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, math.inf)  # 0 forgets all, inf keeps all; ViG has 16
SEED = 0


class Head(NamedTuple):
    """`[1, 1, T, 27]`: queries, which are also the keys, and what enters the gates of the two scans."""

    q: Tensor
    x_fwd: Tensor
    x_rev: Tensor

    def gates(self, tau: float) -> tuple[Tensor, Tensor]:
        """Both log gates; every token is forgotten at tau = 0, none at tau = inf."""
        if tau == 0:
            return torch.full_like(self.q, -math.inf), torch.full_like(self.q, -math.inf)
        return F.logsigmoid(self.x_fwd) / tau, F.logsigmoid(self.x_rev) / tau


def photograph() -> Image.Image:
    """The middle square of scikit-learn's photograph of a palace in China."""
    image = Image.fromarray(load_sample_image("china.jpg"))
    left, top = (image.width - image.height) // 2, 0
    box = (left, top, left + image.height, top + image.height)
    return image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)


def head(image: Image.Image) -> Head:
    pixels = torch.from_numpy(np.array(image)).double() / 255  # [SIZE, SIZE, 3]
    small = F.adaptive_avg_pool2d(pixels.permute(2, 0, 1), 3 * GRID)  # [3, 3 GRID, 3 GRID]
    f = small.unflatten(1, (GRID, 3)).unflatten(3, (GRID, 3)).permute(1, 3, 0, 2, 4).flatten(0, 1).flatten(1)
    f = (f - f.mean(0)) / f.std(0)  # [T, 27]
    r = torch.Generator().manual_seed(SEED)
    W_fwd, W_rev = (torch.randn(2, 27, 27, generator=r, dtype=torch.float64) / 27**0.5).unbind()
    return Head(*(x[None, None] for x in (F.normalize(f, dim=1), f @ W_fwd, f @ W_rev)))


def weights(head: Head, tau: float) -> Tensor:
    """A_fwd + A_rev, `[T, T]`."""
    g_fwd, g_rev = head.gates(tau)
    return sum(
        attention_matrix(head.q, head.q, g, reverse=reverse, scale=0.5)[0, 0]
        for g, reverse in ((g_fwd, False), (g_rev, True))
    )


def as_bytes(A: Tensor) -> tuple[Tensor, Tensor]:
    """`[T, T]` as bytes from -127 to 127 and a scale for each row."""
    scale = A.abs().amax(dim=1) / 127
    return (A / scale[:, None]).round().to(torch.int8), scale


def encoded(x: Tensor) -> str:
    return base64.b64encode(x.numpy().tobytes()).decode()


def setting(head: Head, tau: float) -> dict:
    A = weights(head, tau)
    bytes_, scale = as_bytes(A)
    totals = torch.stack([A.tril(-1), A.triu(1)]).abs().sum(2)
    g = torch.cat(head.gates(tau))
    return {
        "tau": "∞" if math.isinf(tau) else f"{tau:g}",
        "mean_alpha": round(g.exp().mean().item(), 4),
        "scale": encoded(scale.float()),
        "weights": encoded(bytes_),
        "totals": encoded(totals.float()),
    }


def main() -> None:
    image = photograph()
    image.save(HERE / "china.jpg", quality=85, optimize=True)
    data = {"grid": GRID, "settings": [setting(head(image), tau) for tau in TAUS]}
    (HERE / "data.js").write_text("// Written by precompute.py.\nconst EXPLORER = " + json.dumps(data) + ";\n")


if __name__ == "__main__":
    main()
