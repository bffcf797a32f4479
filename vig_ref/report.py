"""What `vig-ref verify` shows: a table for the terminal, one for the documentation, and a page to look at.

A report is a dictionary: `passed`, `seconds`, `rows` (see `checks.row`), `not_run` (how many checks should be there and
are not), `missing` (layers left out, with the reason) and what `machine.circumstances` knows. The page is one file:
no script, no font, no picture from anywhere else.
"""

import functools
import html
import math
from typing import Any

from vig_ref.agreement import LAYERS
from vig_ref.checks import CHECKS, LARGEST, Check
from vig_ref.tolerance import NAMES, REGIMES

Report = dict[str, Any]
Row = dict[str, Any]
SHORT = {
    "float64": "fp64", "float32": "fp32", "float32 with tf32 products": "tf32", "float16": "fp16", "bfloat16": "bf16",
}  # fmt: skip


# --- tables ----------------------------------------------------------------------------------------------------------


def by_column(report: Report) -> dict[tuple[str, str], dict[str, Row]]:
    """The rows by (layer, arithmetic), then by check."""
    columns: dict[tuple[str, str], dict[str, Row]] = {}
    for row in sorted(report["rows"], key=lambda row: (*LAYERS, "model").index(row["layer"])):
        if row["layer"] != "model":
            columns.setdefault((row["layer"], row["arithmetic"]), {})[row["check"]] = row
    return columns


def cell(row: Row | None) -> str:
    """A ratio in four characters; `=` is equality to the last bit."""
    if row is None:
        return ""
    if not row["passed"]:
        return "FAIL"
    return "=" if row["ratio"] == 0 else "<.01" if row["ratio"] < 0.005 else f"{row['ratio']:.2f}"


def table(report: Report) -> str:
    """The report for the terminal, under 100 columns."""
    columns = by_column(report)
    before = [("", ""), *columns]
    names = [layer if layer != last else "" for (layer, _), (last, _) in zip(columns, before, strict=False)]
    lines = [
        "Largest error / bound or RMS / limit of each check, at most 1; '=' is equal to the last bit\n",
        f"{'':<12}{'':<16}" + "".join(f"{name:>7}" for name in names),
        f"{'':<12}{'':<16}" + "".join(f"{SHORT[arithmetic]:>7}" for _, arithmetic in columns),
    ]
    last = ""
    for check in CHECKS:
        cells = "".join(f"{cell(rows.get(check.name)):>7}" for rows in columns.values())
        lines.append(f"{check.group if check.group != last else '':<12}{check.name:<16}{cells}")
        last = check.group
    models = [row for row in report["rows"] if row["layer"] == "model"]
    lines.append(f"{'model':<12}{'parameters':<16}   {sum(row['passed'] for row in models)} of {len(models)} presets")
    return "\n".join([*lines, *(f"\n{reason}" for reason in report["missing"].values())])


def failures(report: Report) -> list[str]:
    """One line for each failed check: the layer, the check, what was found. A check that did not run has failed."""
    lines = [describe(row) for row in report["rows"] if not row["passed"]]
    return lines + [f"{report['not_run']} checks did not run"] * (report["not_run"] > 0)


def describe(row: Row) -> str:
    ratio = f" ({row['ratio']:.3g} times the bound)" if 1 < row["ratio"] < LARGEST else ""
    return f"{row['layer']}, {row['arithmetic']}, {row['check']}: {row['says']}{ratio}"


def verdict(report: Report) -> str:
    failed = sum(not row["passed"] for row in report["rows"]) + report["not_run"]
    total = len(report["rows"]) + report["not_run"]
    what = f"{failed} of {total} checks FAILED" if failed else f"all {total} checks hold"
    return f"{what} on {report['device']}"


def record(report: Report) -> Report:
    """What is worth keeping of a report: the largest error / bound for each layer, arithmetic, regime and tensor."""
    errors = [
        {"layer": row["layer"], "arithmetic": row["arithmetic"], "regime": row["check"]}
        | {"ratios": {name: float(f"{m['ratio']:.3g}") for name, m in row["tensors"].items()}}
        for row in report["rows"]
        if row["check"] in REGIMES
    ]
    kept = ("device", "date", "command", "versions", "passed", "seconds")
    return {key: report[key] for key in kept} | {"checks": len(report["rows"]), "errors": errors}


def markdown(kept: Report) -> str:
    """A record as a table: a layer and its arithmetic by the regime of the gates."""
    versions = kept["versions"]
    lines = [
        f"{kept['device']}, torch {versions['torch']}, Triton {versions['triton']}, {kept['date'][:10]}, "
        f"`{kept['command']}`: {kept['checks']} checks, {'all hold' if kept['passed'] else 'SOME FAILED'}.",
        "",
        "| layer | arithmetic | " + " | ".join(REGIMES) + " |",
        "|---|---|" + "---|" * len(REGIMES),
    ]
    columns: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for row in kept["errors"]:
        columns.setdefault((row["layer"], row["arithmetic"]), {})[row["regime"]] = row["ratios"]
    for (layer, arithmetic), cells in columns.items():
        worst = {regime: max(ratios, key=ratios.__getitem__) for regime, ratios in cells.items()}
        texts = [f"{cells[r][worst[r]]:.2g} {worst[r]}" if cells[r][worst[r]] else "0" for r in REGIMES]
        lines.append(f"| {layer} | {arithmetic} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


# --- pictures --------------------------------------------------------------------------------------------------------


def svg(width: float, height: float, label: str, *parts: str) -> str:
    """An inline picture; its colours are the classes of STYLE, so that it follows light and dark."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{html.escape(label)}">{"".join(parts)}</svg>'
    )


def text(x: float, y: float, words: str, *, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{html.escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def mark(layer: str, x: float, y: float, kind: str, title: str, r: float = 3.2) -> str:
    """A circle for naive, a square for chunked, a triangle for fused; a tooltip says what it is."""
    shapes = {
        "naive": f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0",
        "chunked": f"M{x - r:.1f} {y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}z",
        "fused": f"M{x:.1f} {y - 1.3 * r:.1f}l{1.3 * r:.1f} {2.3 * r:.1f}h{-2.6 * r:.1f}z",
        "planted": f"M{x - r:.1f} {y - r:.1f}l{2 * r} {2 * r}m0 {-2 * r}l{-2 * r} {2 * r}",
    }
    return f'<path d="{shapes[layer]}" class="{kind}"><title>{html.escape(title)}</title></path>'


def picture(report: Report) -> str:
    """Error against bound, both logarithmic: every agreement lies under the diagonal, planted mistakes above it."""
    left, top, side, low, high = 62, 14, 560, -19, 2  # powers of ten on both axes

    def at(power: float) -> float:
        return (min(max(power, low), high) - low) / (high - low) * side

    corner = f"M{left} {top}h{side}L{left} {top + side}z"
    parts = [f'<path d="{corner}" class="refused"/>', line(left, top + side, left + side, top, "limit")]
    for power in range(low + 1, high, 3):
        x, y = left + at(power), top + side - at(power)
        parts += [line(x, top, x, top + side, "grid"), line(left, y, left + side, y, "grid")]
        parts += [text(x, top + side + 17, f"1e{power}", anchor="middle")]
        parts += [text(left - 7, y + 4, f"1e{power}", anchor="end")]
    parts += [text(left + 16, top + 26, "refused: error > bound", kind="red")]
    parts += [text(left + side - 14, top + side - 14, "accepted: error ≤ bound", anchor="end")]
    parts += [text(left + side / 2, top + side + 40, "bound on the error of this element", anchor="middle")]
    upright = f'<g transform="translate(14 {top + side / 2}) rotate(-90)">'
    parts += [upright + text(0, 0, "error found", anchor="middle") + "</g>"]
    for row in report["rows"]:
        planted = row["group"] == "checker"
        for name, m in row["tensors"].items():
            if m["error"] > 0 and m["bound"] > 0:
                x, y = left + at(math.log10(m["bound"])), top + side - at(math.log10(m["error"]))
                kind = f"{'planted ' if planted else ''}{SHORT[row['arithmetic']]}"
                where = f"{row['layer']}, {row['arithmetic']}, {row['check']}, {name}"
                title = f"{where}: {m['error']:.1e} of {m['bound']:.1e}"
                parts.append(mark("planted" if planted else row["layer"], x, y, kind, title))
    return svg(left + side + 12, top + side + 50, "error against bound", *parts)


def strip(rows: dict[str, Row]) -> str:
    """One layer in one arithmetic: error / bound of the six tensors by regime, on a scale where 1 is the limit."""
    left, top, height, step = 34, 12, 150, 58
    width = step * len(REGIMES)

    def y(ratio: float) -> float:
        return top + height * (1.15 - min(ratio, 1.13)) / 1.15

    parts = [f'<rect x="{left}" y="{top}" width="{width}" height="{y(1) - top:.1f}" class="refused"/>']
    for tick in (0, 0.5, 1):
        parts += [line(left, y(tick), left + width, y(tick), "limit" if tick == 1 else "grid")]
        parts += [text(left - 6, y(tick) + 4, f"{tick:g}", anchor="end")]
    for n, regime in enumerate(REGIMES):
        parts.append(text(left + step * (n + 0.5), top + height + 16, regime, anchor="middle"))
        for i, name in enumerate(NAMES):
            m = rows[regime]["tensors"].get(name) if regime in rows else None
            if m:
                x = left + step * (n + 0.5) + 7.5 * (i - 2.5)
                title = f"{name}: {m['ratio']:.2g} of its bound, {m['rms']:.2g} of the limit on the whole tensor"
                parts += [line(x, y(0), x, y(m["ratio"]), f"stem t{i}")]
                parts += [mark("naive", x, y(m["ratio"]), f"dot t{i}", title, 2.6)]
    return svg(left + width + 4, top + height + 24, "error over bound by gate regime", *parts)


# --- the page --------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #5d6675; --paper: #fdfdfb; --card: #ffffff; --rule: #e3e5e8;
  --good: #00734f; --bad: #c03a00; --refused: #fbeee7; --fp64: #6b7280; --fp32: #0072b2; --tf32: #009e73;
  --fp16: #b0579a; --bf16: #d57f00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ee; --soft: #a0a8b6; --paper: #14171c; --card: #1b1f26;
  --rule: #313743; --good: #4ecb9d; --bad: #ff8a5c; --refused: #33211b; --fp64: #a3abba; --fp32: #56b4e9;
  --tf32: #3ecf9f; --fp16: #e08fca; --bf16: #f0b042; } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 2.5rem 1.25rem 5rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem } h2 { font-size: 1.3rem; margin: 3rem 0 .5rem }
h3 { font-size: 1rem; margin: 0 0 .25rem } p { max-width: 44rem } .soft, dt { color: var(--soft) }
.verdict { border-left: .4rem solid var(--good); background: var(--card); padding: .8rem 1.1rem; font-size: 1.15rem }
.verdict.failed { border-color: var(--bad) } .verdict ul { font-size: 1rem; padding-left: 1.2rem }
svg { width: 100%; height: auto; display: block } svg text { font: 12px system-ui, sans-serif; fill: var(--soft) }
svg text.red { fill: var(--bad) } .hero { max-width: 42rem }
.refused { fill: var(--refused) } .grid { stroke: var(--rule) } .limit { stroke: var(--bad); stroke-width: 1.5 }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1rem }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: .5rem; padding: .8rem }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0; list-style: none; font-size: .9rem }
.legend svg { width: 14px; height: 14px; display: inline-block; vertical-align: -2px; margin-right: .35rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { padding: .25rem .5rem; vertical-align: top; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--rule) }
th { font-weight: 600 } td.fail { color: var(--card); background: var(--bad); font-weight: 700 }
th.name, td.name { text-align: left } th[colspan] { text-align: center }
td.asks { text-align: left; white-space: normal; min-width: 16rem; color: var(--soft) }
th.first, td.first { border-left: 1px solid var(--rule) }
dl { display: grid; grid-template-columns: auto 1fr; gap: .1rem 1rem }
dd { margin: 0; overflow-wrap: anywhere }
"""
STYLE += "".join(
    f".{a} {{ fill: var(--{a}); fill-opacity: .75 }}\n"
    f".planted.{a} {{ stroke: var(--{a}); stroke-width: 1.6; fill: none }}\n"
    for a in SHORT.values()
)
#: Okabe and Ito's colours, of middle lightness: they show on white and on black.
STYLE += "".join(
    f".t{i} {{ fill: {colour}; stroke: {colour} }}\n"
    for i, colour in enumerate(["#0072b2", "#009e73", "#56b4e9", "#cc79a7", "#d55e00", "#e69f00"])
)


def page(report: Report) -> str:
    """The report as one HTML file."""
    failed = "".join(f"<li>{html.escape(failure)}</li>" for failure in failures(report))
    missing = "".join(f"<p class=soft>{html.escape(reason)}</p>" for reason in report["missing"].values())
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>vig-ref verify: {html.escape(verdict(report))}</title>
<style>{STYLE}</style>
<h1>Is this kernel right, on this machine?</h1>
<p class="verdict{" failed" * bool(failed)}"><b>{html.escape(verdict(report))}</b>,
in {report["seconds"]:.0f} seconds.</p>
{failed and f"<ul>{failed}</ul>"}{missing}
<p>Bidirectional gated linear attention was computed in every layer and every arithmetic that was asked for and that
this machine has. Its result <i>o</i> and its five gradients were compared, element by element, with the plain
recurrence in float64 on the same inputs.</p>

<h2>Error against bound</h2>
<p>Rounding has a size that can be computed: each element gets its own bound, from the unit roundoff of the arithmetic
and from the magnitude of what was added up to make it. A mark is a tensor under one kind of gates, at the element that
came nearest to its bound. Under the line is rounding; above it is a mistake. The crosses are mistakes made on purpose:
a tensor 1&nbsp;% off, which this checker had to refuse. With half precision an element may be off by more than that;
there the second gate refuses, the root mean square over the whole tensor.</p>
<div class="hero">{picture(report)}</div>
<ul class="legend">{picture_legend(report)}</ul>

<h2>How near, by gates</h2>
<p>The same ratio, error over bound, for each tensor. <i>vig</i> gates are what a ViG computes; <i>keep</i> forgets
nothing; <i>strong</i> fades the memory by e<sup>-20</sup> to e<sup>-100</sup> at every token; a
<i>reset</i> is a log gate of -∞.</p>
<ul class="legend">{strip_legend()}</ul>
<div class="cards">{cards(report)}</div>

<h2>Every check</h2>
<p>The larger of error over bound and root mean square over its limit; at most 1 holds. “=” is equal to the last bit.
Point at a number to read what was found.</p>
<div class="scroll">{grid(report)}</div>

<h2>The run</h2>
<dl>{circumstances(report)}</dl>
</html>
"""


def picture_legend(report: Report) -> str:
    arithmetics = dict.fromkeys(arithmetic for _, arithmetic in by_column(report))
    colours = [(a, sample("chunked", SHORT[a])) for a in arithmetics]
    shapes = [(layer, sample(layer, "fp64")) for layer in LAYERS]
    shapes += [("1 % off, planted", sample("planted", "planted fp64"))]
    return "".join(f"<li>{picture}{name}</li>" for name, picture in colours + shapes)


def strip_legend() -> str:
    return "".join(f"<li>{sample('naive', f't{i}')}{name}</li>" for i, name in enumerate(NAMES))


def sample(layer: str, kind: str) -> str:
    return svg(14, 14, kind, mark(layer, 7, 7, kind, kind, 4))


def cards(report: Report) -> str:
    """One strip for each layer and arithmetic."""
    return "".join(
        f'<div class="card"><h3>{layer}, {arithmetic}</h3>{strip(rows)}</div>'
        for (layer, arithmetic), rows in by_column(report).items()
    )


def grid(report: Report) -> str:
    """All checks by layer and arithmetic, and what each check asks."""
    columns = by_column(report)
    spans = [(layer, sum(name == layer for name, _ in columns)) for layer in LAYERS]
    layers = "".join(f'<th class="first" colspan="{n}">{layer}</th>' for layer, n in spans if n)
    first = {next(key for key in columns if key[0] == layer) for layer, n in spans if n}
    heads = "".join(f"<th{css(key in first)}>{SHORT[key[1]]}</th>" for key in columns)
    body = "".join(
        f'<tr><td class="name">{check.name}</td>'
        + "".join(square(rows.get(check.name), key in first) for key, rows in columns.items())
        + f'<td class="asks first">{html.escape(asks(check))}</td></tr>'
        for check in CHECKS
    )
    head = f'<tr><th></th>{layers}<th></th></tr><tr><th class="name">check</th>{heads}<th></th></tr>'
    return f"<table>{head}{body}</table>"


def css(first: bool, failed: bool = False) -> str:
    names = " ".join(name for name, on in (("first", first), ("fail", failed)) if on)
    return f' class="{names}"' if names else ""


def square(row: Row | None, first: bool) -> str:
    title = f' title="{html.escape(describe(row))}"' if row else ""
    return f"<td{css(first, row is not None and not row['passed'])}{title}>{html.escape(cell(row))}</td>"


def asks(check: Check) -> str:
    """The first sentence of a check's docstring: what it asks is written once, where it is done."""
    if isinstance(check.function, functools.partial):
        return f"All shapes, {check.name} gates."
    return (check.function.__doc__ or "").strip()


def circumstances(report: Report) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    models = "; ".join(f"{row['arithmetic']} {row['says']}" for row in report["rows"] if row["layer"] == "model")
    facts = {"device": report["device"], "date": report["date"], "command": report["command"], "versions": versions}
    facts["presets"] = models
    return "".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items())
