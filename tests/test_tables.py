"""`vig-ref tables`: what it counts, what it says of the paper's figures, what it writes."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from vig_ref import cli, tables
from vig_ref.flops import count_macs
from vig_ref.model import create_model

COMMITTED = Path(__file__).parents[1] / "docs" / "results" / "tables.json"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The command without timm, as for somebody who has none."""
    out = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "import_timm", lambda: (None, "ModuleNotFoundError: No module named 'timm'"))
        assert cli.main(["tables", "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize(
    ("printed", "value", "expected"),
    [
        ("0.9", 0.96, True), ("0.9", 0.94, True), ("0.9", 1.17, False), ("15.5", 15.56, True), ("6", 5.83, True),
        ("12", 20.6, False), ("5.72", 5.716, True), ("5.72", 5.729, True), ("5.72", 5.713, False),
        ("5.72", 5.731, False),
    ],
)  # fmt: skip
def test_whether_a_printed_figure_agrees(printed, value, expected):
    assert tables.agrees(printed, value) == expected


@pytest.mark.parametrize(
    ("gmacs", "without", "params", "expected"),
    [
        (1.17, 0.94, 5.83, "misses the down-projections: 0.94 without"), (0.91, 0.7, 5.83, "agrees"),
        (1.2, 1.2, 5.83, "GMACs -25.0%"), (0.9, 0.9, 4.8, "parameters +25.0%"),
    ],
)  # fmt: skip
def test_verdicts(gmacs, without, params, expected):
    row = {"paper_params": "6", "paper_gmacs": "0.9", "params": params * 1e6, "macs": gmacs * 1e9}
    assert tables.verdict(row | {"macs_without_down_proj": without * 1e9}) == expected


def test_the_page(written):
    page = (written / "tables.md").read_text()
    assert "| ViG-T | 6 | 5,834,536 | 0.9 | 1.17 | misses the down-projections: 0.94 without |" in page
    assert "| ViG-H-B | 89 | 88,904,360 | 15.5 | 15.56 | agrees |" in page
    assert "| GLA_Vim | 6.70 | 6,697,000 |  | 1.34 | agrees |" in page
    assert "Not counted: timm cannot be imported (ModuleNotFoundError: No module named 'timm')." in page
    assert page.count("| agrees |") == 3 + 7
    assert (written / "flops_resolution.png").read_bytes().startswith(b"\x89PNG")


def test_the_committed_page_is_what_the_command_writes(written):
    """Everything that does not need timm; its part is checked where timm is."""
    fresh, committed = json.loads((written / "tables.json").read_text()), json.loads(COMMITTED.read_text())
    for part in ("table_4", "table_3_and_5"):
        assert fresh[part] == committed[part]
    assert fresh["figure_4a"]["ViG-T"] == committed["figure_4a"]["ViG-T"]
    assert (COMMITTED.parent / "tables.md").read_text() == tables.markdown(keyed_by_number(committed))


def keyed_by_number(data):
    """JSON has made strings of the sides in pixels."""
    curves = {name: {int(n): macs for n, macs in curve.items()} for name, curve in data["figure_4a"].items()}
    return data | {"figure_4a": curves}


def test_cost_grows_with_the_number_of_tokens(written):
    """ViG is linear: beyond the head, 84 times the tokens cost 84 times as much."""
    curve = json.loads((written / "tables.json").read_text())["figure_4a"]["ViG-T"]
    with torch.device("meta"):
        head = count_macs(create_model("vig_tiny"))["head"]
    assert math.isclose((curve["2048"] - head) / (curve["224"] - head), (2048 / 224) ** 2, rel_tol=1e-9)


def test_a_timm_that_cannot_be_imported_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    timm, reason = tables.import_timm()
    assert timm is None
    assert reason.startswith("ModuleNotFoundError: import of timm halted")
    assert reason.endswith("; install the extra 'timm': pip install 'vig_ref[timm]'")


def test_a_torchvision_that_does_not_fit_is_a_reason_of_its_own(monkeypatch, tmp_path):
    """As PyPI's beside a CPU build of torch: timm is installed, and installing it would not help."""
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    timm, reason = tables.import_timm()
    assert timm is None
    advice = "install the torchvision that matches your torch build"
    assert reason == f"RuntimeError: operator torchvision::nms does not exist; {advice}"
    data = json.loads(COMMITTED.read_text())
    page = tables.markdown(keyed_by_number(data) | {"table_1": reason})
    assert f"Not counted: timm cannot be imported ({reason}).\n" in page
    assert "pip install" not in page
