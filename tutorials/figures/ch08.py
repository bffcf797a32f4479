"""Figures of chapter 8, how to trust a kernel. Each function returns a matplotlib figure."""

from matplotlib.colors import ListedColormap
from matplotlib.patches import Rectangle
from torch import Tensor

from figures import FWD, INK, MUTED, Figure, new_figure

BAD = "#b2182b"


def errors(exact: Tensor, gauge: Tensor, bound: Tensor, right: Tensor, wrong: Tensor) -> Figure:
    """The errors of a right and of a slightly wrong layer, against the result and against the gauge."""
    figure = new_figure(8.0, 4.2)
    axes = figure.subplots(1, 2, sharey=True)
    order = gauge.flatten().argsort()
    for ax, x in zip(axes, (exact.abs(), gauge), strict=True):
        for error, colour, label in ((wrong, BAD, "1 % too small"), (right, FWD, "the layer")):
            y = error.abs().flatten() + 1e-14  # an error of 0 has no logarithm
            ax.loglog(x.flatten()[::3], y[::3], ".", ms=2.5, color=colour, label=label)  # every third: a small file
        ax.grid(alpha=0.25)
    axes[0].set(xlabel="|X64|, the result", ylabel="|X - X64|, the error", xlim=(1e-6, 1e4))
    axes[1].plot(gauge.flatten()[order], bound.flatten()[order], color=INK, lw=1.6, label="the bound")
    axes[1].set(xlabel="G, the gauge", ylim=(1e-12, 1e3))
    handles = axes[1].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, markerscale=4, frameon=False)
    return figure


def shrinking(tried: list[tuple[int, bool]], smallest: int) -> Figure:
    """The lengths that a search tried, in their order."""
    figure = new_figure(7.2, 3.3)
    ax = figure.subplots()
    first = next(n for n, (_, passed) in enumerate(tried) if not passed)
    ax.axvspan(first + 0.5, len(tried), color=MUTED, alpha=0.12)
    for passed, colour, marker, label in ((True, FWD, "o", "within the bound"), (False, BAD, "X", "beyond the bound")):
        points = [(n, T) for n, (T, ok) in enumerate(tried) if ok == passed]
        ax.plot(*zip(*points, strict=True), marker, color=colour, ms=5, ls="", label=label)
    ax.axhline(smallest, color=INK, lw=1, ls="--")
    ax.text(first / 2, ax.get_ylim()[1] * 1.02, "search", ha="center")
    ax.text((first + len(tried)) / 2, ax.get_ylim()[1] * 1.02, "shrinking", ha="center")
    ax.set(xlabel="call", ylabel="tokens T")
    ax.set_yticks(sorted({0, 50, 100, smallest, 200, 250, 300}))
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def corners(ratios: dict[str, dict[str, float]]) -> Figure:
    """Error / bound by regime of the gates, a row for each layer."""
    figure = new_figure(7.6, 2.3)
    ax = figure.subplots()
    columns = list(next(iter(ratios.values())))
    for y, row in enumerate(ratios.values()):
        for x, ratio in enumerate(row.values()):
            ax.add_patch(Rectangle((x - 0.47, y - 0.45), 0.94, 0.9, color=FWD if ratio <= 1 else BAD, alpha=0.8))
            ax.text(x, y, f"{ratio:.2g}", ha="center", va="center", color="white")
    ax.set(xlim=(-0.55, len(columns) - 0.45), ylim=(len(ratios) - 0.45, -0.55))
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(ratios)), list(ratios))
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return figure


def red_zone(margin: int, T: int, C: int) -> Figure:
    """A tensor of T tokens in the middle of poisoned memory, and the tile of C tokens that a kernel loads."""
    figure = new_figure(7.2, 1.7)
    ax = figure.subplots()
    for n in range(2 * margin + T):
        inside = margin <= n < margin + T
        ax.add_patch(Rectangle((n, 0), 0.92, 0.9, color=FWD if inside else "#f4c7c3", lw=0))
        ax.text(n + 0.46, 0.43, f"x{n - margin}" if inside else "NaN", ha="center", va="center",
                color="white" if inside else BAD, fontsize=7.5)  # fmt: skip
    ax.add_patch(Rectangle((margin - 0.08, -0.12), C + 0.08, 1.14, fill=False, ec=INK, lw=1.6))
    ax.text(margin, 1.25, f"the tile that a kernel loads, C = {C}", va="bottom")
    ax.text(margin, -0.75, f"x: [T] = [{T}]", color=FWD)
    ax.set(xlim=(-0.3, 2 * margin + T + 0.2), ylim=(-0.9, 1.8))
    ax.axis("off")
    return figure


def matrix(seen: dict[str, dict[str, bool]]) -> Figure:
    """Planted bugs by checks: a square where the check saw the bug."""
    figure = new_figure(8.0, 6.4)
    ax = figure.subplots()
    columns = list(next(iter(seen.values())))
    cells = [[float(found[c]) for c in columns] for found in seen.values()]
    ax.imshow(cells, cmap=ListedColormap(["#f3f3f3", FWD]), vmin=0, vmax=1, aspect="auto")
    ax.set_xticks(range(len(columns)), [f"{c}" for c in columns], rotation=40, ha="left")
    ax.set_yticks(range(len(seen)), list(seen))
    ax.xaxis.tick_top()
    ax.set_xticks([n + 0.5 for n in range(len(columns) - 1)], minor=True)
    ax.set_yticks([n + 0.5 for n in range(len(seen) - 1)], minor=True)
    ax.grid(which="minor", color="white", lw=2)
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_visible(False)
    counts = [sum(found[c] for found in seen.values()) for c in columns]
    for n, count in enumerate(counts):
        ax.text(n, len(seen) - 0.3, str(count), ha="center", va="top")
    ax.text(-0.6, len(seen) - 0.3, f"seen, of {len(seen)}", ha="right", va="top")
    return figure
