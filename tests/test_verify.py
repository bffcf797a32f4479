"""`vig-ref verify`, shortened but real: it passes, it can fail, and what it writes is complete and needs no network."""

import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from vig_ref import agreement, checks, chunked, cli, naive, report, verify
from vig_ref.checks import CHECKS, LAW_SHAPE, PARAMETERS, Effort
from vig_ref.tolerance import NAMES, REGIMES

DOCS = Path(__file__).parents[1] / "docs"
RIGHT = chunked.bidirectional_gla


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One real run of all layers in float32: its exit code, its report and its folder."""
    out = tmp_path_factory.mktemp("verify") / "made" / "by verify"
    code = quick(out, "--record", str(out / "errors.json"))
    return code, json.loads((out / "report.json").read_text()), out


@pytest.fixture
def without_fused(monkeypatch):
    """For tests of something else: saves the interpreter's time."""
    monkeypatch.setattr(agreement, "own_process", lambda *_: iter(()))
    available = agreement.AVAILABLE | {("fused", "cpu"): ()}
    monkeypatch.setattr(agreement, "AVAILABLE", available)
    monkeypatch.setattr(verify, "AVAILABLE", available)


def quick(out, *arguments):
    return cli.main(["verify", "--quick", "--dtype", "float32", "--out", str(out), *arguments])


def chunked_row(name):
    """The outcome of one check of the chunked layer in float32."""
    (layer,) = agreement.layers("chunked", "cpu", ["float32"])
    (check,) = (check for check in CHECKS if check.name == name)
    return checks.row("chunked", "float32", "", name, lambda: check.function(layer, Effort(quick=True)))


# --- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_passes_every_check_of_every_layer(finished):
    code, result, _ = finished
    assert code == 0
    assert result["passed"]
    assert {"passed", "seconds", "not_run", "missing", "rows", "device", "date", "command", "versions"} == result.keys()
    seen = [(row["layer"], row["check"]) for row in result["rows"] if row["layer"] != "model"]
    assert sorted(seen) == sorted(itertools.product(agreement.LAYERS, (check.name for check in CHECKS)))
    assert {row["arithmetic"] for row in result["rows"] if row["layer"] == "model"} == set(PARAMETERS)


def test_every_regime_has_its_six_errors_and_bounds(finished):
    rows = [row for row in finished[1]["rows"] if row["check"] in REGIMES]
    assert {row["check"] for row in rows} == set(REGIMES)
    for row in rows:
        assert tuple(row["tensors"]) == NAMES
        for m in row["tensors"].values():
            assert 0 <= m["ratio"] <= 1
            assert math.isclose(m["error"], m["ratio"] * m["bound"], rel_tol=1e-6)


def test_the_table_fits_the_terminal(finished):
    lines = report.table(finished[1]).splitlines()
    assert max(map(len, lines)) <= 100
    assert all(any(check.name in line for line in lines) for check in CHECKS)


def test_the_record_is_what_the_report_option_prints(finished, capsys):
    path = finished[2] / "errors.json"
    assert cli.main(["verify", "--report", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed == report.markdown(json.loads(path.read_text())) + "\n"
    assert printed.count("\n| ") == 1 + len(agreement.LAYERS)


# --- the page --------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags that are open, and everything that could load something."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.seen = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action", "style")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(finished):
    text = (finished[2] / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.loads == []
    assert page.seen.isdisjoint({"script", "link", "iframe", "object", "img"})
    assert not re.search(r"https?:|url\(|@import", text)
    assert {"svg", "table", "style"} <= page.seen


def test_the_page_shows_every_check_and_layer(finished):
    text = (finished[2] / "report.html").read_text()
    for check in CHECKS:
        assert f'<td class="name">{check.name}</td>' in text
    for layer in agreement.LAYERS:
        assert f"<h3>{layer}, float32</h3>" in text
    assert text.count('<path d="M') > 3 * len(REGIMES) * len(NAMES)


# --- it can fail -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_a_layer_one_percent_off_is_named(factor, monkeypatch, tmp_path, capsys, without_fused):
    monkeypatch.setattr(chunked, "bidirectional_gla", lambda *x, **o: factor * RIGHT(*x, **o))
    assert quick(tmp_path) == 1
    assert "FAILED: chunked, float32, vig: 2 cases, worst " in capsys.readouterr().err
    result = json.loads((tmp_path / "report.json").read_text())
    failed = {row["check"] for row in result["rows"] if not row["passed"]}
    assert {row["layer"] for row in result["rows"] if not row["passed"]} == {"chunked"}
    assert set(REGIMES) | {"layouts", "exact integers", "keep all", "forget all", "red zones", "self-check"} <= failed
    page = (tmp_path / "report.html").read_text()
    assert 'class="verdict failed"' in page
    assert "<li>chunked, float32, vig" in page


def swapped(q, k, v, g_fwd, g_rev, **options):
    return RIGHT(q, k, v, g_rev, g_fwd, **options)


def later_seen(q, k, v, g_fwd, g_rev, **options):
    return RIGHT(q, k, v, g_fwd, g_rev, **options) + 1e-4 * v.flip(2)


def one_gradient_lost(q, k, v, g_fwd, g_rev, **options):
    return RIGHT(q, k, v, g_fwd.detach(), g_rev, **options) + 0 * g_fwd.exp().sum()


def unrepeatable(*tensors, **options):
    return RIGHT(*tensors, **options) * (1 + 1e-6 * torch.rand(()))


def writes_to_its_input(q, *tensors, **options):
    o = RIGHT(q, *tensors, **options)
    q.data[0, 0, 0, 0] += 1
    return o


def reads_behind_the_end(q, *tensors, **options):
    return RIGHT(q, *tensors, **options) + 0 * q.as_strided((1,), (1,), q.storage_offset() + q.shape[-1])


@pytest.mark.parametrize(("mistake", "seen_by"), [
    (swapped, ["vig", "moderate"]),
    (later_seen, ["causal", "packing", "forget all"]),
    (one_gradient_lost, ["moderate"]),
    (unrepeatable, ["repeatable"]),
    (writes_to_its_input, ["red zones"]),
    (reads_behind_the_end, ["red zones"]),
])  # fmt: skip
def test_mistakes_are_seen(mistake, seen_by, monkeypatch):
    monkeypatch.setattr(chunked, "bidirectional_gla", mistake)
    for name in seen_by:
        assert not chunked_row(name)["passed"], name


def test_an_oracle_that_is_wrong_is_seen_by_the_laws(monkeypatch):
    """Layer and oracle share a mistake, the diagonal counted twice: they agree, but not with the closed forms."""
    for module, right in ((naive, naive.bidirectional_gla), (chunked, RIGHT)):
        twice = lambda q, k, v, *g, scale, right=right: (  # noqa: E731
            right(q, k, v, *g, scale=scale) + scale * (q * k).sum(-1, keepdim=True) * v
        )
        monkeypatch.setattr(module, "bidirectional_gla", twice)
    assert chunked_row("moderate")["passed"]
    assert not chunked_row("keep all")["passed"]
    assert not chunked_row("forget all")["passed"]


def test_a_bound_too_wide_fails_the_self_check(monkeypatch):
    right = agreement.measure
    loose = lambda *x: {n: m._replace(ratio=m.ratio / 1e6, rms=m.rms / 1e6) for n, m in right(*x).items()}  # noqa: E731
    monkeypatch.setattr(checks, "measure", loose)
    assert not chunked_row("self-check")["passed"]


def test_a_check_that_raises_has_failed_and_says_why(monkeypatch):
    def broken(*x, **options):
        raise ValueError("no such kernel")

    monkeypatch.setattr(chunked, "bidirectional_gla", broken)
    row = chunked_row("vig")
    assert not row["passed"]
    assert row["says"] == "ValueError: no such kernel"
    assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_a_wrong_number_of_parameters_fails(monkeypatch):
    monkeypatch.setitem(PARAMETERS, "vig_tiny", 5_834_535)
    failed = [row for row in checks.parameter_counts() if not row["passed"]]
    assert [row["says"] for row in failed] == ["5,834,536 parameters, not 5,834,535"]


def test_checks_that_did_not_run_are_a_failure(monkeypatch, tmp_path, capsys):
    """The fused layer's process dies before it has said anything."""
    monkeypatch.setattr(agreement.sys, "executable", "false")
    monkeypatch.setattr(checks, "CHECKS", CHECKS[-1:])
    assert quick(tmp_path) == 1
    captured = capsys.readouterr()
    assert "FAILED: 1 checks did not run" in captured.err
    assert "the fused layer could not be compared" in captured.out
    assert "1 of 9 checks FAILED" in captured.out
    assert "1 of 9 checks FAILED" in (tmp_path / "report.html").read_text()


def test_on_a_gpu_the_fused_layer_meets_one_piece_segments_and_halves():
    """It is compared in each of the ways in which it cuts sequences, and repeated in halves."""
    launch = pytest.importorskip("vig_ref.fused.launch")
    fused = agreement.Layer("fused", "float32", "cuda", None, launch.CHUNK)
    ways, cuts = {}, {}
    for B, H, T, K, V in Effort(device="cuda").shapes(fused):
        q, v = (torch.empty(B, H, T, D, device="meta") for D in (K, V))
        cuts[B, H, T, K, V] = cut = launch._cut(q, v, q, q)
        ways[B, H, T, K, V] = "halves" if cut.halves else "segments" if cut.grid[2] > 1 else "one piece"
    assert set(ways.values()) == {"one piece", "segments", "halves"}
    assert all(ways[sizes] == "halves" and sizes[2] % launch.CHUNK for sizes in checks.HALVES)
    for cut in (cuts[sizes] for sizes in checks.HALVES):  # of 132 multiprocessors, bfloat16
        assert launch._meet_backward(cut, 132 * 8 // launch.TILES[cut.tile].backward).sizes[4] == 208


def test_one_nan_is_refused():
    (layer,) = agreement.layers("naive", "cpu", ["float32"])
    x = layer.draw(*LAW_SHAPE)
    got = {name: torch.full_like(t, math.nan) for name, t in zip(NAMES, (x.v, *x[:5]), strict=True)}
    assert all(m.ratio == math.inf for m in agreement.measure(layer, got, x, 0.5).values())


# --- what it refuses, and what it leaves out -------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "message"), [
    (["--device", "abacus"], "argument --device: invalid choice: 'abacus'"),
    (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    (["--deep", "--quick"], "not allowed with argument --deep"),
])  # fmt: skip
def test_refusals(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["verify", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="vig-ref verify: --device cuda needs an NVIDIA GPU"):
        quick(tmp_path, "--device", "cuda")


def test_a_layer_without_the_dtype_is_left_out_by_name(monkeypatch):
    names = ["float16"]
    assert verify.left_out("cpu", names) == {"fused": "fused: not run, because on cpu it has float64, float32 only"}
    assert verify.left_out("cuda", names) == {}
    monkeypatch.setattr(agreement, "has_triton", lambda: False)
    assert verify.left_out("cuda", names) == {"fused": agreement.NO_TRITON}


# --- the committed record --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((DOCS / "results").glob("errors-*.json")), ids=lambda path: path.stem)
def test_the_page_in_the_docs_shows_the_record(path):
    """After a new record: what `vig-ref verify --report FILE` prints goes between the markers of the page."""
    kept = json.loads(path.read_text())
    assert kept["passed"]
    shown = re.search(
        rf"<!-- begin {path.name} -->\n(.*?)\n<!-- end {path.name} -->", (DOCS / "verification.md").read_text(), re.S
    )
    assert shown, f"docs/verification.md has no markers for {path.name}"
    assert shown[1] == report.markdown(kept)


@pytest.mark.gpu
def test_verify_on_a_gpu(tmp_path):
    assert cli.main(["verify", "--device", "cuda", "--quick", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert {row["arithmetic"] for row in rows if row["layer"] == "fused"} == set(agreement.AVAILABLE["fused", "cuda"])
