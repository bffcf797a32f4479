"""Figures of chapter 3: blocks of programs, walks, exponents, the roofline, and the record of a GPU."""

import numpy as np
from matplotlib.patches import Rectangle
from torch import Tensor

from figures import BOTH, FWD, INK, MUTED, REV, Figure, new_figure

IMPLS = {"floor": INK, "fused": BOTH, "chunked": FWD, "naive": MUTED, "sdpa": REV, "fla": "#2e8b57"}
FLOAT32_EXPONENT = 128  # 2^128 is infinite


def programs(T: int, C: int) -> Figure:
    """T tokens, and the blocks of C that programs take of them."""
    figure = new_figure(7.2, 1.9)
    ax = figure.subplots()
    for t in range(-(-T // C) * C):
        there = t < T
        colour = (FWD, REV, BOTH)[t // C % 3] if there else "white"
        edge, hatch = ("white", None) if there else (MUTED, "////")
        ax.add_patch(Rectangle((t, 0), 1, 1, facecolor=colour, edgecolor=edge, hatch=hatch, linewidth=1))
    for n in range(-(-T // C)):
        ax.text(n * C + C / 2, 1.35, f"program_id = {n}\ntokens {n * C} to {n * C + C - 1}", ha="center", fontsize=10)
    ax.annotate(f"T = {T}", (T, -0.05), (T, -0.75), ha="center", arrowprops={"arrowstyle": "-", "color": INK})
    ax.set(xlim=(-0.3, -(-T // C) * C + 0.2), ylim=(-0.9, 2.5))
    ax.axis("off")
    return figure


def walks(N: int = 4) -> Figure:
    """Both walks of a program over N chunks, and what lies in memory between them."""
    figure = new_figure(7.4, 4.2)
    ax = figure.subplots()
    rows = (
        (4.2, REV, "1. right to left", "S_rev  [V, K]\nin registers"),
        (2.35, "#e9e2f2", "memory", "share of o\n[C, V]"),
        (0.5, FWD, "2. left to right", "S_fwd  [V, K]\nin registers"),
    )
    arrow = {"arrowstyle": "-|>", "linewidth": 1.5}
    for y, colour, name, text in rows:
        ax.text(-0.25, y + 0.45, name, ha="right", va="center", fontsize=10)
        for n in range(N):
            x = 2.3 * n
            dark = colour in (FWD, REV)
            ax.add_patch(Rectangle((x, y), 1.7, 0.95, facecolor=colour, edgecolor=INK, linewidth=0.8))
            ax.text(x + 0.85, y + 0.47, text.format(n=n), ha="center", va="center", fontsize=9,
                    color="white" if dark else INK)  # fmt: skip
    for n in range(N):
        x = 2.3 * n
        ax.annotate("", (x + 0.5, 3.32), (x + 0.5, 4.2), arrowprops=arrow | {"color": REV})
        ax.annotate("", (x + 0.5, 1.47), (x + 0.5, 2.35), arrowprops=arrow | {"color": BOTH})
        ax.text(x + 1.1, 5.32, f"q, k, v, g_rev\nof chunk {n}", ha="center", fontsize=8, color=MUTED)
        ax.text(x + 0.85, -0.45, f"o of chunk {n}\n[C, V]", ha="center", va="top", fontsize=9)
        ax.annotate("", (x + 0.85, -0.4), (x + 0.85, 0.5), arrowprops=arrow | {"color": INK})
        ax.text(x + 0.7, 1.87, "q, k, v,\ng_fwd", fontsize=8, color=MUTED, va="center")
        if n < N - 1:
            ax.annotate("", (x + 1.7, 4.67), (x + 2.3, 4.67), arrowprops=arrow | {"color": REV})
            ax.annotate("", (x + 2.3, 0.97), (x + 1.7, 0.97), arrowprops=arrow | {"color": FWD})
    ax.set(xlim=(-2.4, 2.3 * N - 0.4), ylim=(-1.3, 6.1))
    ax.axis("off")
    return figure


def exponents(b_edge: Tensor, b_middle: Tensor) -> Figure:
    """b and -b of a chunk, in base 2, from the edge and from the middle, with the end of float32."""
    figure = new_figure(7.2, 3.2)
    limit = float(-b_edge.min()) * 1.1
    for ax, b, name in zip(figure.subplots(1, 2, sharey=True), (b_edge, b_middle), ("edge", "middle"), strict=True):
        tokens = range(len(b))
        ax.axhspan(FLOAT32_EXPONENT, limit, color=REV, alpha=0.15, linewidth=0)
        ax.axhline(0, color=MUTED, linewidth=0.8)
        ax.plot(tokens, b, "o-", color=FWD, markersize=4, label="b, of q")
        ax.plot(tokens, -b, "s-", color=REV, markersize=4, label="-b, of k")
        if name == "middle":
            ax.axvline(len(b) / 2 - 0.5, color=MUTED, linestyle="--", linewidth=1)
        ax.set(xlabel="token of the chunk", ylim=(-limit, limit), title=f"b counted from the {name}")
        ax.set_xticks(range(0, len(b), 5))
    figure.axes[0].set(ylabel="exponent, base 2")
    figure.axes[0].text(0, FLOAT32_EXPONENT * 1.12, "infinite in float32", fontsize=9, color=REV)
    figure.axes[0].legend(frameon=False, loc="lower left", fontsize=9)
    return figure


def errors(gates: list[float], found: dict[str, list[float]], bound: float) -> Figure:
    """Error by gate of the fast path, of halving and of both together; a cross on top is NaN or infinite."""
    figure = new_figure(7.2, 3.3)
    ax = figure.subplots()
    styles = (("x--", REV, 9), ("o-", MUTED, 8), (".-", BOTH, 8))
    top = 1e-2
    for (name, values), (line, colour, size) in zip(found.items(), styles, strict=True):
        finite = np.nan_to_num(values, nan=top, posinf=top)
        shown = np.clip(finite, None, top)
        ax.plot([-gate for gate in gates], shown, line, color=colour, markersize=size, label=name)
    ax.axhline(top, color=REV, linewidth=0.6)
    ax.text(0.035, top * 0.75, "no number, or none that is near", fontsize=9, color=REV, va="top")
    turn = -bound / 16 * np.log(2)
    ax.axvline(turn, color=BOTH, linestyle=":", linewidth=1.2)
    ax.text(turn / 1.06, 2e-5, "BOUND", rotation=90, fontsize=9, color=BOTH, ha="right", va="center")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set(xlabel="-g, the same for every token", ylabel="relative error", ylim=(1e-8, 2.5e-2))
    ax.set_xticks([0.04, 0.5, 2, 5, 10, 20, 100], ["0.04", "0.5", "2", "5", "10", "20", "100"])
    ax.minorticks_off()
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(0.02, 0.55))
    return figure


def roofline(points: dict[str, float], copy: float, tensor: float) -> Figure:
    """What a machine reaches at best, by FLOPs per byte, and where operations lie under it."""
    figure = new_figure(6.8, 3.5)
    ax = figure.subplots()
    x = np.logspace(-0.5, 3.5, 200)
    ax.loglog(x, np.minimum(x * copy, tensor) / 1e12, color=INK, linewidth=2)
    kink = tensor / copy
    ax.axvline(kink, color=MUTED, linewidth=0.8, linestyle="--")
    ax.text(kink * 1.08, 0.7, f"kink: {kink:.0f} FLOPs per byte", fontsize=9, color=MUTED)
    for (name, intensity), colour in zip(points.items(), (BOTH, REV), strict=True):
        y = intensity * copy / 1e12
        ax.plot(intensity, y, "o", color=colour, markersize=9)
        ax.annotate(f"{name}\n{intensity:.1f} FLOPs per byte", (intensity * 1.25, y / 1.15), fontsize=9, color=colour,
                    va="top", bbox={"color": "white", "pad": 1})  # fmt: skip
    ax.text(1.2, 9, "memory", rotation=38, fontsize=10)
    ax.text(kink * 2.2, tensor / 1e12 * 1.25, "tensor cores", fontsize=10)
    ax.set(xlabel="FLOPs per byte moved", ylabel="TFLOP/s at best", xlim=(0.4, 3000), ylim=(0.4, 2500))
    ax.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
    ax.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
    ax.minorticks_off()
    return figure


# --- the record ------------------------------------------------------------------------------------------------------


def _times(record: dict, which: str) -> dict[str, dict[str, float]]:
    """Milliseconds by shape and implementation, in the record's order."""
    times = {}
    for row in record["rows"]:
        if row["pass"] == which and row["ms"] is not None:
            times.setdefault(row["shape"], {})[row["impl"]] = row["ms"]
    return times


def describe(record: dict, floor_bytes: int) -> None:
    """Where, when and by which command a record was written; `floor_bytes` are those of T224, forward."""
    versions = [f"{package} {version}" for package, version in record["versions"].items() if version != "missing"]
    print(record["device"], "|", ", ".join(versions))
    print(record["date"], "|", record["command"])
    floor = _times(record, "forward").get("T224", {}).get("floor")
    if floor:
        print(f"floor: by a copy that moves {floor_bytes / floor / 1e9:.2f} TB/s")


def table(record: dict, which: str) -> None:
    """Milliseconds, a line a shape, and how far the fused layer is from the floor."""
    times = _times(record, which)
    impls = [name for name in IMPLS if any(name in row for row in times.values())]
    print(f"\n{which}, ms")
    print(f"{'':10}", *(f"{name:>9}" for name in impls), " fused/floor")
    for shape, row in times.items():
        cells = [f"{row[name]:9.4f}" if name in row else f"{'':9}" for name in impls]
        ratio = f"{row['fused'] / row['floor']:12.1f}" if {"fused", "floor"} <= row.keys() else ""
        print(f"{shape:10}", *cells, ratio)


def record(record: dict | None, low: float, high: float) -> Figure:
    """Forward times by shape, and the predicted range of T224 in microseconds."""
    times = _times(record, "forward") if record else {"T224": {}}
    figure = new_figure(7.2, 1.7 + 0.35 * len(times))
    ax = figure.subplots()
    shapes = list(times)
    for name, colour in IMPLS.items():
        here = [(shape, row[name]) for shape, row in times.items() if name in row]
        if here:
            marker = {"floor": "|", "fused": "D"}.get(name, "o")
            ax.plot([ms for _, ms in here], [shapes.index(shape) for shape, _ in here], marker, color=colour,
                    markersize=14 if name == "floor" else 7, linestyle="none", label=name)  # fmt: skip
    if "T224" in times:
        y = shapes.index("T224")
        span = low / 1e3, high / 1e3
        ax.fill_betweenx([y - 0.3, y + 0.3], *span, color=BOTH, alpha=0.2, label="predicted", linewidth=0)
    ax.set_xscale("log")
    ax.set_yticks(range(len(shapes)), shapes)
    ax.set_ylim(len(shapes) - 0.4, -0.6)
    if not record:
        ax.set_xlim(0.005, 1)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set(xlabel="milliseconds, forward")
    ax.grid(axis="x", alpha=0.3)
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), labelspacing=0.8)
    return figure
