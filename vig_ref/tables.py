"""`vig-ref tables`: the paper's sizes and costs beside what is counted here, and Figure 4a.

Every measured number is counted from a model on the meta device: nothing is allocated, and the whole takes seconds.
With timm installed, the models that the paper compares with are built and counted in the same way.

The last column is about the paper's figure: it agrees if the measured one, rounded or cut, can be printed like it.
"""

import argparse
import importlib.metadata
import json
import math
from pathlib import Path
from typing import Any

import torch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from torch import nn

from vig_ref.cli import make_folders
from vig_ref.demo import BLUE, ORANGE, new_figure
from vig_ref.flops import count_macs
from vig_ref.machine import import_timm
from vig_ref.model import PRESETS, create_model
from vig_ref.roadmap import GLA_VIM, ROADMAP, create_row

#: Table 4: millions of parameters and billions of multiply-accumulates ("FLOPs" there), as printed.
TABLE_4 = {
    "vig_tiny": ("ViG-T", "6", "0.9"),
    "vig_small": ("ViG-S", "23", "3.5"),
    "vig_base": ("ViG-B", "89", "13.8"),
    "vig_h_tiny": ("ViG-H-T", "29", "4.5"),
    "vig_h_small": ("ViG-H-S", "50", "8.8"),
    "vig_h_base": ("ViG-H-B", "89", "15.5"),
}
#: Table 1, the models that timm has: name there, name in the paper, pixels a side, parameters and FLOPs as printed.
TABLE_1 = [
    ("vit_base_patch16_384", "ViT-B/16", 384, "86", "55.4"),
    ("vit_large_patch16_384", "ViT-L/16", 384, "307", "190.7"),
    ("deit_tiny_patch16_224", "DeiT-T", 224, "6", "1.3"),
    ("deit_small_patch16_224", "DeiT-S", 224, "22", "4.6"),
    ("deit_base_patch16_224", "DeiT-B", 224, "86", "17.6"),
    ("gmlp_ti16_224", "gMLP-T", 224, "6", "1.4"),
    ("gmlp_s16_224", "gMLP-S", 224, "20", "4.5"),
    ("gmlp_b16_224", "gMLP-B", 224, "73", "15.8"),
    ("regnety_040", "RegNetY-4G", 224, "12", "4"),
    ("regnety_080", "RegNetY-8G", 224, "25", "8"),
    ("regnety_160", "RegNetY-16G", 224, "45", "16"),
    ("efficientnet_b3", "EffNet-B3", 300, "12", "1.8"),
    ("efficientnet_b4", "EffNet-B4", 380, "19", "4.2"),
    ("efficientnet_b5", "EffNet-B5", 456, "30", "9.9"),
    ("convnext_tiny", "ConvNeXt-T", 224, "29", "4.5"),
    ("convnext_small", "ConvNeXt-S", 224, "50", "8.7"),
    ("convnext_base", "ConvNeXt-B", 224, "89", "15.4"),
    ("swin_tiny_patch4_window7_224", "Swin-T", 224, "28", "4.6"),
    ("swin_small_patch4_window7_224", "Swin-S", 224, "50", "8.7"),
    ("swin_base_patch4_window7_224", "Swin-B", 224, "88", "15.4"),
]
#: Figure 4a: sides in pixels that the patch size divides, and the paper's quotients DeiT-T / ViG-T.
RESOLUTIONS = (224, 384, 512, 640, 768, 1024, 1280, 1536, 2048)
PAPER_QUOTIENTS = {1024: 5.2, 2048: 17.4}


# --- counting --------------------------------------------------------------------------------------------------------


def size_of(model: nn.Module, img_size: int = 224) -> dict[str, Any]:
    """Parameters and multiply-accumulates, and the latter without the second matrix of every SwiGLU."""
    macs = count_macs(model, img_size)
    hidden = sum(n for name, n in macs.items() if name.endswith("mlp.down_proj"))
    params = sum(p.numel() for p in model.parameters())
    return {"params": params, "macs": macs[""], "macs_without_down_proj": macs[""] - hidden}


def table_4() -> list[dict[str, Any]]:
    rows = []
    for name in PRESETS:
        paper_name, params, flops = TABLE_4[name]
        with torch.device("meta"):
            model = create_model(name)
        rows.append({"name": paper_name, "model": name, "paper_params": params, "paper_gmacs": flops, **size_of(model)})
    return rows


def table_3() -> list[dict[str, Any]]:
    rows = []
    for name, row in {**ROADMAP, "gla_vim": GLA_VIM}.items():
        with torch.device("meta"):
            model = create_row(name)
        rows.append({
            "name": row.paper_name, "model": name, "table": 5 if row is GLA_VIM else 3,
            "paper_params": f"{row.paper_params:.2f}", **size_of(model),
        })  # fmt: skip
    return rows


def table_1(timm: Any) -> list[dict[str, Any]]:
    rows = []
    for name, paper_name, img_size, params, flops in TABLE_1:
        row = {"name": paper_name, "model": name, "img_size": img_size, "paper_params": params, "paper_gmacs": flops}
        rows.append(row | size_of(baseline(timm, name), img_size))
    return rows


def baseline(timm: Any, name: str, **options: Any) -> nn.Module:
    """A model of timm on the meta device."""
    with torch.device("meta"):
        return timm.create_model(name, **options)


def figure_4a(timm: Any | None) -> dict[str, dict[int, int]]:
    """Multiply-accumulates by side of the image; DeiT-T only with timm."""
    with torch.device("meta"):
        curves = {"ViG-T": {n: count_macs(create_model("vig_tiny"), n)[""] for n in RESOLUTIONS}}
    if timm:
        curves["DeiT-T"] = {
            n: count_macs(baseline(timm, "deit_tiny_patch16_224", img_size=n), n)[""] for n in RESOLUTIONS
        }
    return curves


def measure() -> dict[str, Any]:
    timm, reason = import_timm()
    names = ("torch", "timm") if timm else ("torch",)
    return {
        "versions": {name: importlib.metadata.version(name) for name in names},
        "table_4": table_4(), "table_3_and_5": table_3(), "figure_4a": figure_4a(timm),
        "table_1": table_1(timm) if timm else reason,
    }  # fmt: skip


# --- writing ---------------------------------------------------------------------------------------------------------


def agrees(printed: str, value: float) -> bool:
    """Whether a value, rounded or cut to the printed digits, may read like this."""
    digits = len(printed.partition(".")[2])
    cut = math.floor(value * 10**digits) / 10**digits
    return printed in (f"{value:.{digits}f}", f"{cut:.{digits}f}")


def verdict(row: dict[str, Any]) -> str:
    """What to say of the paper's figures in a row."""
    remarks = []
    if not agrees(row["paper_params"], row["params"] / 1e6):
        remarks.append(f"parameters {float(row['paper_params']) * 1e6 / row['params'] - 1:+.1%}")
    if "paper_gmacs" in row and not agrees(row["paper_gmacs"], row["macs"] / 1e9):
        without = row["macs_without_down_proj"] / 1e9
        if without < row["macs"] / 1e9 and agrees(row["paper_gmacs"], without):
            remarks.append(f"misses the down-projections: {without:.2f} without")
        else:
            remarks.append(f"GMACs {float(row['paper_gmacs']) * 1e9 / row['macs'] - 1:+.1%}")
    return "; ".join(remarks) or "agrees"


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | parameters, paper (M) | measured | GMACs, paper | measured | the paper's figure |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['name']} | {row['paper_params']} | {row['params']:,} | {row.get('paper_gmacs', '')} "
            f"| {row['macs'] / 1e9:.2f} | {verdict(row)} |"
        )
    return "\n".join(lines)


def markdown(data: dict[str, Any]) -> str:
    """All tables as one page."""
    plain = {row["model"]: row["macs"] for row in data["table_4"]}
    parts = [
        "# The paper's tables, counted",
        f"Written by `vig-ref tables` with {', '.join(f'{n} {v}' for n, v in data['versions'].items())}. A GMAC is "
        "10^9 multiply-accumulates of one image in matrix products, convolutions and the operator (vig_ref/flops.py); "
        "the paper calls it FLOPs. A figure agrees if the measured one, rounded or cut, can be printed like it; "
        "otherwise the last column says how far the printed one is off.",
        "## The family (Table 4)", table(data["table_4"]),
        "The authors' SwiGLU multiplies by its second matrix inside an autograd function of its own, which their "
        "counter cannot see; in ViG-H it is an ordinary linear layer, and the figures are right.",
        "## The roadmap (Tables 3 and 5)", table(data["table_3_and_5"]),
        "## Other models (Table 1)",
    ]  # fmt: skip
    if isinstance(data["table_1"], str):
        parts.append(f"Not counted: timm cannot be imported ({data['table_1']}).")
    else:
        other = {row["model"]: row["macs"] for row in data["table_1"]}
        share = plain["vig_small"] / other["deit_base_patch16_224"]
        parts += [
            table(data["table_1"]),
            "RegNetY: the FLOPs agree and the parameters do not, so the paper's column is wrong there. For the others "
            "that are a few percent off, no cause is known.",
            f"ViG-S needs {share:.1%} of DeiT-B's MACs; by the paper's figures, {3.5 / 17.6:.1%}.",
        ]
    parts += ["## MACs against resolution (Figure 4a)", resolution_table(data["figure_4a"])]
    parts += ["![MACs against resolution on logarithmic axes](flops_resolution.png)"]
    return "\n\n".join(parts) + "\n"


def resolution_table(curves: dict[str, dict[int, int]]) -> str:
    quotient = "DeiT-T" in curves
    head = ["side (pixels)", *(f"{name} (GMACs)" for name in curves)]
    head += ["DeiT-T / ViG-T", "paper"] if quotient else []
    lines = [f"| {' | '.join(head)} |", f"|{'---:|' * len(head)}"]
    for n in RESOLUTIONS:
        cells = [str(n), *(f"{curve[n] / 1e9:.2f}" for curve in curves.values())]
        if quotient:
            cells += [f"{curves['DeiT-T'][n] / curves['ViG-T'][n]:.2f}", str(PAPER_QUOTIENTS.get(n, ""))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(curves: dict[str, dict[int, int]], path: Path) -> None:
    """Figure 4a on logarithmic axes: there, a straight line of slope 2 is linear in the number of tokens."""
    figure = new_figure(6.5, 4.2)
    axes = figure.subplots()
    for (name, curve), colour in zip(curves.items(), (BLUE, ORANGE), strict=False):
        gmacs = [macs / 1e9 for macs in curve.values()]
        axes.loglog(RESOLUTIONS, gmacs, "o-", color=colour, markersize=4)
        axes.annotate(
            f"{name}\n{gmacs[-1]:,.0f}", (RESOLUTIONS[-1], gmacs[-1]), color=colour, va="center",
            xytext=(8, 0), textcoords="offset points",
        )  # fmt: skip
    for n in PAPER_QUOTIENTS:
        if "DeiT-T" in curves:
            low, high = curves["ViG-T"][n] / 1e9, curves["DeiT-T"][n] / 1e9
            axes.plot([n, n], [low, high], ":", color="0.5", linewidth=1)
            axes.annotate(
                f"{high / low:.1f}×", (n, (low * high) ** 0.5), xytext=(5, 0), textcoords="offset points",
                color="0.3",
            )  # fmt: skip
    axes.set(xlabel="side of a square image (pixels)", ylabel="multiply-accumulates (10⁹)", xlim=(200, 3000))
    axes.set_title("Cost against resolution (Figure 4a of the paper)", fontsize=11)
    axes.xaxis.set_major_locator(FixedLocator((224, 512, 1024, 2048)))
    axes.xaxis.set_minor_locator(NullLocator())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


# --- the command -----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("out/tables"), help="folder for what is written (out/tables)")


def run(options: argparse.Namespace) -> int:
    make_folders("vig-ref tables", options.out)
    data = measure()
    page = markdown(data)
    (options.out / "tables.json").write_text(json.dumps(data, indent=1) + "\n")
    (options.out / "tables.md").write_text(page)
    draw(data["figure_4a"], options.out / "flops_resolution.png")
    print(page)
    print(f"written: {options.out / 'tables.md'}, tables.json and flops_resolution.png beside it")
    return 0
