"""Figures of chapter 2: which pairs of tokens meet where, what overflows, what is moved."""

import numpy as np
import torch
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.patches import Rectangle
from torch import Tensor

import vig_ref
from figures import FWD, INK, MUTED, REV, Figure, new_figure
from vig_ref import tolerance
from vig_ref.chunked import chunks

LEVELS = ("#16324f", "#1f6fb4", "#5b9bd5", "#a9cdee")  # i = j, then halving from neighbours outwards
STATE = "#e9a23b"


def _ticks(ax) -> None:
    ax.set(xticks=[], yticks=[], xlabel="j, the token that is read", ylabel="i, the token that reads")
    ax.spines[:].set_visible(False)


def weights(A: Tensor, title: str) -> Figure:
    """The matrix of an unrolled recurrence."""
    figure = new_figure(4.6, 3.6)
    ax = figure.subplots()
    limit = float(A.abs().max())
    figure.colorbar(ax.imshow(A, cmap="RdBu_r", vmin=-limit, vmax=limit), ax=ax, shrink=0.8)
    _ticks(ax)
    ax.set_title(title)
    return figure


def met_at(i: int, j: int, C: int) -> int:
    """How the forward scan's token i meets j: 0 not at all, 1 as itself, 2, 3, ... by halving, -1 by the state."""
    if j > i:
        return 0
    if i // C != j // C:
        return -1
    return 1 + (i ^ j).bit_length()


def pairs(T: int, C: int) -> Figure:
    """The matrix of a forward scan, coloured by the step that computes it."""
    figure = new_figure(6.6, 4.1)
    ax = figure.subplots()
    kind = np.array([[met_at(i, j, C) for j in range(T)] for i in range(T)])
    last = 1 + (C - 1).bit_length()
    names = ["not met: zero", "i = j", *(f"half = {2**n}" for n in range(last - 1)), "through the state"]
    colours = ["#f0f0f0", *LEVELS[:last], STATE]
    ax.imshow(np.where(kind < 0, last + 1, kind), cmap=ListedColormap(colours), vmin=0, vmax=last + 1)
    for edge in range(T + 1):
        width = 1.5 if edge % C == 0 else 0.4
        ax.axhline(edge - 0.5, color="white", linewidth=width)
        ax.axvline(edge - 0.5, color="white", linewidth=width)
    _ticks(ax)
    patches = [Rectangle((0, 0), 1, 1, color=colour) for colour in colours]
    ax.legend(patches, names, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    ax.set_title(f"T = {T} tokens in chunks of C = {C}")
    return figure


def steps(C: int, N: int, K: int, V: int) -> Figure:
    """The four steps as boxes with shapes, chunk by chunk."""
    figure = new_figure(7.6, 3.5)
    ax = figure.subplots()
    for n in range(N):
        x = 3.4 * n
        for y, left, text, colour in (
            (0.0, 0, f"q, k, v, g of chunk {n}\n[{C}, {K} or {V}]", "#e6e6e6"),
            (1.25, 0.65, f"1  intra_chunk\no  [{C}, {V}]", LEVELS[3]),
            (2.5, 0, f"2  S_own[{n}]\n[{K}, {V}]", "#f6d9a6"),
            (3.75, 0, f"3  S_in[{n}]\n[{K}, {V}]", STATE),
        ):
            ax.add_patch(Rectangle((x + left, y), 2.5 - left, 0.9, facecolor=colour, edgecolor=INK, linewidth=0.8))
            ax.text(x + (2.5 + left) / 2, y + 0.45, text, ha="center", va="center", fontsize=9)
        arrow = {"arrowstyle": "-|>", "color": INK, "linewidth": 1}
        ax.annotate("", (x + 1.5, 1.25), (x + 1.5, 0.9), arrowprops=arrow)
        ax.annotate("", (x + 0.3, 2.5), (x + 0.3, 0.9), arrowprops=arrow)
        ax.annotate("", (x + 2.3, 2.15), (x + 2.3, 3.75), arrowprops=arrow | {"color": REV}, zorder=3)
        ax.text(x + 2.62, 2.75, "4\nread", color=REV, fontsize=9, va="center")
        if n < N - 1:
            ax.annotate("", (x + 3.4, 4.2), (x + 2.5, 4.2), arrowprops=arrow)
            ax.annotate("", (x + 3.4, 4.0), (x + 2.5, 3.15), arrowprops=arrow)
            ax.text(x + 2.95, 4.3, "exp(total)", ha="center", fontsize=8)
    ax.set(xlim=(-0.1, 3.4 * N - 0.2), ylim=(-0.1, 4.8))
    ax.axis("off")
    return figure


def errors(found: dict[str, Tensor], decays: list[float], sizes: list[int]) -> Figure:
    """Relative errors `[decays, sizes]` of several ways, NaN and infinity written out."""
    figure = new_figure(7.4, 3.9)
    for ax, (name, error) in zip(figure.subplots(1, len(found), sharey=True), found.items(), strict=True):
        finite = torch.where(error.isfinite(), error, torch.nan)
        ax.set_facecolor("#333333")
        ax.imshow(finite, cmap="YlOrRd", norm=LogNorm(1e-8, 1), aspect="auto")
        for (i, j), value in np.ndenumerate(error.numpy()):
            text = f"{value:.0e}".replace("e-0", "e-") if np.isfinite(value) else "NaN"
            colour = "white" if not np.isfinite(value) or value > 1e-2 else INK
            ax.text(j, i, text, ha="center", va="center", fontsize=8, color=colour)
        ax.set_xticks(range(len(sizes)), sizes)
        ax.set_yticks(range(len(decays)), [f"{-d:g}" for d in decays])
        ax.set(xlabel="tokens in a chunk, C")
        ax.set_title(name, fontsize=10)
        ax.spines[:].set_visible(False)
    figure.axes[0].set(ylabel="log gate g of every token")
    return figure


def moved(sizes: list[int], inputs: int, state: Tensor) -> Figure:
    """Elements moved a token, by chunk size."""
    figure = new_figure(6.4, 3)
    ax = figure.subplots()
    ax.loglog(sizes, state + inputs, color=INK, label="all")
    ax.loglog(sizes, state, color=STATE, label="the state")
    ax.axhline(inputs, color=FWD, linestyle="--", label="q, k, g, v, o")
    ax.set(xlabel="tokens in a chunk, C (1 is the loop)", ylabel="elements a token")
    ax.set_xticks(sizes, sizes)
    ax.set_yticks([10, 30, 100, 300, 1000, 3000], [10, 30, 100, 300, 1000, 3000])
    ax.minorticks_off()
    ax.legend(frameon=False)
    return figure


def times(sizes: list[int], predicted: list[float], measured: list[float], loop: tuple[float, float]) -> Figure:
    """Milliseconds by chunk size, predicted and measured; the loop as two lines."""
    figure = new_figure(7.2, 3.2)
    ax = figure.subplots()
    for (seconds, shown), colour, marker, name in (
        ((loop[0], predicted), MUTED, "--", "predicted"),
        ((loop[1], measured), FWD, "o-", "measured"),
    ):
        ax.plot(sizes, [1e3 * s for s in shown], marker, color=colour, label=f"chunked, {name}")
        ax.axhline(1e3 * seconds, color=REV if colour == FWD else "#e0b8a8", linewidth=1.5, label=f"loop, {name}")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(sizes, sizes)
    ax.set_yticks([1, 2, 5, 10, 20, 50, 100, 200], [1, 2, 5, 10, 20, 50, 100, 200])
    everything = [1e3 * s for s in (*predicted, *measured, *loop)]
    ax.set_ylim(min(everything) / 1.3, max(everything) * 1.3)
    ax.minorticks_off()
    ax.set(xlabel="tokens in a chunk, C", ylabel="milliseconds")
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


# --- the animation of the chunks -------------------------------------------------------------------------------------


def chunk_data() -> dict:
    """Numbers of docs/animations/chunk.html: the four steps of the chunked layer on 24 tokens, forward scan."""
    T, C, K, V = 24, 8, 4, 4
    x = tolerance.draw(B=1, H=1, T=T, K=K, V=V, regime="vig", seed=3, dtype=torch.float64)
    q, k, v, g = (chunks.cut(t, C) for t in (x.q, x.k, x.v, 4 * x.g_fwd))  # gates a little stronger, to see them
    A = _unrolled(x.q, x.k, 4 * x.g_fwd)
    wanted = vig_ref.gla(x.q, x.k, x.v, 4 * x.g_fwd, scale=1.0, backend="naive")[0, 0]  # [T, V]
    S_own = ((k * torch.exp(chunks.decay_from(g, False))).mT @ v)[0, 0]  # [N, K, V]
    decay = torch.exp(g.sum(-2))[0, 0]  # exp(total)  [N, K]
    S_in = [torch.zeros(K, V, dtype=torch.float64)]
    for n in range(len(S_own) - 1):
        S_in.append(decay[n, :, None] * S_in[n] + S_own[n])
    across = ((q * torch.exp(chunks.decay_to(g, False)))[0, 0] @ torch.stack(S_in)).flatten(0, 1)  # [T, V]
    kinds = torch.tensor([[met_at(i, j, C) for j in range(T)] for i in range(T)])
    return {
        "T": T, "C": C, "A": A, "kinds": kinds.tolist(), "S_own": S_own, "S_in": torch.stack(S_in), "decay": decay,
        "missing": _missing(A, kinds, x.v[0, 0], across, wanted, C),
    }  # fmt: skip


def _unrolled(q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    eye = torch.eye(q.shape[2], dtype=q.dtype)[None, None]
    return vig_ref.gla(q, k, eye, g, scale=1.0, backend="naive")[0, 0]  # o = A v, and v = I  [T, T]


def _missing(A: Tensor, kinds: Tensor, v: Tensor, across: Tensor, wanted: Tensor, C: int) -> Tensor:
    """What each token's result still lacks after each part of the work, `[parts, T]`: none, levels, then chunks."""
    o, parts = torch.zeros_like(wanted), []
    parts.append(o)
    for kind in range(1, int(kinds.max()) + 1):
        o = o + (A * (kinds == kind)) @ v
        parts.append(o)
    for n in range(1, len(wanted) // C):
        o = o.clone()
        o[n * C : (n + 1) * C] += across[n * C : (n + 1) * C]
        parts.append(o)
    return (torch.stack(parts) - wanted).norm(dim=-1)


