"""What `vig-ref bench ops` shows: a table for the terminal, tables for the documentation, and a picture.

A report is a dictionary: `rows`, each one implementation in one pass at one shape, `left_out` with reasons, `checks`,
`copy_gb_per_s` and what `machine.circumstances` knows.
"""

import argparse
import functools
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from vig_ref import traffic
from vig_ref.demo import BLUE, ORANGE, new_figure
from vig_ref.traffic import PASSES

Row = dict[str, Any]
Report = dict[str, Any]
Cell = Callable[[dict[str, Row]], str]  # of the rows of one shape and pass, by implementation
IMPLS = ("fused", "chunked", "naive", "sdpa", "fla", "floor")
PEER_PACKAGES = ("flash-linear-attention", "fla-core")  # the first brings the second, which has the kernels


def destinations(options: argparse.Namespace, name: str) -> list[Path]:
    """Where a report of this name goes: into the folder of --out, and to --record if that was given."""
    return [options.out / name, *([options.record] if options.record else [])]


# --- tables ----------------------------------------------------------------------------------------------------------


def by_impl(found: Report, shape_name: str, which: str) -> dict[str, Row]:
    rows = (r for r in found["rows"] if r["shape"] == shape_name and r["pass"] == which)
    return {r["impl"]: r for r in rows}


def left_out_lines(found: Report) -> list[str]:
    """One line a reason, with the shapes: `naive at T2048, T2048b1: too many tokens ...`."""
    where: dict[tuple[str, str], list[str]] = {}
    for m in found["left_out"]:
        where.setdefault((m["impl"], m["reason"]), []).append(m["shape"])
    return [f"{impl} at {', '.join(names)}: {reason}" for (impl, reason), names in where.items()]


def number(x: float | None, digits: int = 3) -> str:
    """So many digits, without an exponent."""
    if x is None:
        return ""
    decimals = max(0, digits - 1 - math.floor(math.log10(x))) if x > 0 else 0
    return f"{x:,.{decimals}f}"


def quartiles(found: list[float]) -> list[float]:
    return statistics.quantiles(found, n=4, method="inclusive")


def spread(found: Iterable[tuple[str, float, float, float]], calls: str) -> str:
    """A sentence on the row, `(name, low, median, high)`, whose quartiles lie farthest from its median in per cent."""
    apart = [(max(high - middle, middle - low) / middle, name) for name, low, middle, high in found]
    if not apart:
        return ""
    most, name = max(apart)
    return f"In the row that varies most, {name}, half of the {calls} are within {100 * most:.2g} % of it."


def table(found: Report) -> str:
    """For the terminal, under 100 columns: medians with the middle half of the calls, and ratios."""
    lines = [
        f"Milliseconds on {found['device']}; a copy moves {found['copy_gb_per_s']:,.0f} GB/s. "
        "x floor, x sdpa: how many times its time", "",
        f"{'shape':<14}{'pass':<18}{'impl':<9}{'ms':>9}{'middle half':>20}{'MiB':>9}{'x floor':>9}{'x sdpa':>9}",
    ]  # fmt: skip
    last = ("", "")
    for r in found["rows"]:
        peers = by_impl(found, r["shape"], r["pass"])
        name, which = r["shape"] if r["shape"] != last[0] else "", r["pass"] if (r["shape"], r["pass"]) != last else ""
        spread = "" if r["impl"] == "floor" else f"{number(r['ms_low'])} to {number(r['ms_high'])}"
        ratios = "".join(f"{number(r['ms'] / peers[p]['ms'], 2) if p in peers else '':>9}" for p in ("floor", "sdpa"))
        lines.append(
            f"{name:<14}{which:<18}{r['impl']:<9}{number(r['ms']):>9}{spread:>20}{number(r['mib']):>9}{ratios}"
        )
        last = (r["shape"], r["pass"])
    return "\n".join([*lines, "", *(f"left out: {line}" for line in left_out_lines(found))]).rstrip()


def markdown(found: Report, picture: Path) -> str:
    """A record for the documentation: a table for each pass, one for memory, and the picture if it lies beside it."""
    versions = found["versions"]
    fla = next((versions[name] for name in PEER_PACKAGES if versions[name] != "missing"), None)
    rows = ((f"{r['impl']} {r['pass']} at {r['shape']}", r["ms_low"], r["ms"], r["ms_high"]) for r in found["rows"])
    packages = [f"torch {versions['torch']}", f"Triton {versions['triton']}"]
    lines = [
        f"{circumstances(found, *packages, *([f'flash-linear-attention {fla}'] if fla else []))}. "
        f"A copy moves {found['copy_gb_per_s']:,.0f} GB/s. Times are medians. {spread(rows, 'calls')}"
    ]
    others: dict[str, Cell] = {"fused, counted": functools.partial(counted, found["copy_gb_per_s"])}
    others |= {f"fused / {peer}": functools.partial(ratio, peer) for peer in ("floor", "sdpa")}
    lines += milliseconds(found, medians(IMPLS) | others)
    lines += ["", "Forward + backward, MiB beyond the inputs at the peak:", ""]
    lines += grid(found, PASSES[1], {i: functools.partial(memory, i) for i in IMPLS})
    if found["left_out"]:
        lines += ["", f"Left out: {'; '.join(left_out_lines(found))}."]
    if picture.exists():
        lines += ["", f"![Milliseconds against the number of tokens, both logarithmic](results/{picture.name})"]
    return "\n".join(lines)


def circumstances(found: Report, *packages: str) -> str:
    """What somebody needs to repeat a run. packages: names with their versions."""
    return ", ".join([found["device"], *packages, found["date"][:10], f"`{found['command']}`"])


def medians(impls: Iterable[str]) -> dict[str, Cell]:
    """A column for each."""
    return {impl: functools.partial(median, impl) for impl in impls}


def median(impl: str, rows: dict[str, Row]) -> str:
    return number(rows[impl]["ms"]) if impl in rows else ""


def counted(copy_gb_per_s: float, rows: dict[str, Row]) -> str:
    """Milliseconds that the bytes would take for which the fused layer asks, had none of them been in a cache.

    Its launcher is asked how it cuts the sequences, and that is not there without Triton.
    """
    if "fused" not in rows:
        return ""
    B, H, T, K, V, which = (rows["fused"][name] for name in (*"BHTKV", "pass"))
    try:
        bytes_a_token = traffic.fused(K, V, T, B * H)[which]
    except ImportError:
        return "needs Triton"
    return number(B * H * T * bytes_a_token / copy_gb_per_s / 1e6)


def memory(impl: str, rows: dict[str, Row]) -> str:
    return number(rows[impl]["mib"]) if impl in rows else ""


def ratio(peer: str, rows: dict[str, Row]) -> str:
    return number(rows["fused"]["ms"] / rows[peer]["ms"], 2) if {"fused", peer} <= rows.keys() else ""


def milliseconds(found: Report, columns: dict[str, Cell]) -> list[str]:
    """A table a pass."""
    lines = []
    for which in PASSES:
        lines += ["", f"{which.replace('+', ' + ').capitalize()}, milliseconds:", "", *grid(found, which, columns)]
    return lines


def grid(found: Report, which: str, columns: dict[str, Cell]) -> list[str]:
    """A line a shape; columns that are empty throughout are left out."""
    shapes = {name: by_impl(found, name, which) for name in dict.fromkeys(r["shape"] for r in found["rows"])}
    kept = {name: cell for name, cell in columns.items() if any(cell(rows) for rows in shapes.values())}
    lines = [f"| shape | B, H, T, K, V | {' | '.join(kept)} |", "|---|---|" + "---|" * len(kept)]
    for name, rows in shapes.items():
        sizes = ", ".join(str(next(iter(rows.values()))[size]) for size in "BHTKV")
        lines.append(f"| {name} | {sizes} | {' | '.join(cell(rows) for cell in kept.values())} |")
    return lines if kept else ["Not counted on a CPU."]


# --- the picture -----------------------------------------------------------------------------------------------------

STYLES = {
    "fused": (BLUE, "o"), "chunked": ("#009E73", "s"), "naive": ("#E69F00", "D"), "sdpa": (ORANGE, "^"),
    "fla": ("#CC79A7", "v"), "floor": ("0.35", "_"),
}  # fmt: skip


def draw(found: Report, path: Path) -> None:
    """Time against T, a panel a pass: shapes with the heads of the first one, the largest batch at each T."""
    largest: dict[int, Row] = {}
    for r in found["rows"]:
        heads_match = all(r[size] == found["rows"][0][size] for size in "HKV")
        if heads_match and r["B"] > largest.get(r["T"], {"B": 0})["B"]:
            largest[r["T"]] = r
    names = [largest[T]["shape"] for T in sorted(largest)]
    figure = new_figure(10, 4.8)
    figure.suptitle(f"Bidirectional gated linear attention on {found['device']}, bfloat16", fontsize=11)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, which in zip(panels, PASSES, strict=True):
        panel(axes, {name: by_impl(found, name, which) for name in names})
        axes.set_title(which.replace("+", " + "))
    panels[0].set_ylabel("milliseconds")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path)


def panel(axes: Any, shapes: dict[str, dict[str, Row]]) -> None:
    for impl, (colour, mark) in STYLES.items():
        line = [rows[impl] for rows in shapes.values() if impl in rows]
        if line:
            style = "--" if impl == "floor" else "-"
            axes.plot([r["T"] for r in line], [r["ms"] for r in line], style, marker=mark, color=colour, label=impl)
    floors = {name: rows["floor"] for name, rows in shapes.items()}
    labels = [f"{r['T']:,}\n{name}, B = {r['B']}" for name, r in floors.items()]
    axes.set(xscale="log", yscale="log", xlabel="T, tokens of a sequence")
    axes.margins(x=0.12)
    axes.set_xticks([r["T"] for r in floors.values()], labels, fontsize=9)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
