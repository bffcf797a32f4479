"""`vig-ref bench models`: what it measures on a CPU, what its table says, what it refuses to tell."""

import json
import re

import pytest
import torch

import test_timm  # noqa: F401  (lets timm be imported beside a CPU build of torch)
from test_bench import DOCS, between_markers
from vig_ref import bench_models, chunked, cli, naive
from vig_ref.bench_models import CASES, MODELS, PASSES


@pytest.fixture(autouse=True, scope="module")
def hurry():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_models, "SECONDS", 0.01)
        yield


def models(*arguments):
    return cli.main(["bench", "models", "--device", "cpu", *arguments])


def test_a_run_on_the_cpu(tmp_path, capsys):
    record = tmp_path / "made" / "record.json"
    assert models("--images", "32,2", "48,1", "--out", str(tmp_path / "out"), "--record", str(record)) == 0
    printed = capsys.readouterr().out
    report = json.loads(record.read_text())
    assert json.loads((tmp_path / "out" / "models.json").read_text()) == report
    assert report["command"] == "vig-ref bench models --device cpu --images 32,2 48,1"
    assert {"device", "versions", "date", "left_out"} < report.keys()
    rows = {(r["pixels"], r["batch"], r["model"], r["how"], r["pass"]) for r in report["rows"]}
    assert rows == {(*case, name, "eager", which) for case in ((32, 2), (48, 1)) for name in MODELS for which in PASSES}
    for r in report["rows"]:
        assert 0 < r["low"] <= r["images_per_s"] <= r["high"]
        assert r["mib"] is None
        assert ("error" in r) == (r["model"] == "ViG-T" and r["pass"] == "inference")
        assert r.get("error", 0) <= bench_models.LIMIT
    assert models("--report", str(record)) == 0
    assert capsys.readouterr().out.strip() in printed


def test_without_timm_there_is_no_peer_and_a_reason(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_models, "import_timm", lambda: (None, "ImportError: none"))
    assert models("--images", "32,1", "--out", str(tmp_path)) == 0
    assert {r["model"] for r in json.loads((tmp_path / "models.json").read_text())["rows"]} == {"ViG-T"}
    assert "\nLeft out: DeiT-T: ImportError: none.\n" in capsys.readouterr().out


def one_direction(q, k, v, g_fwd, g_rev, *, scale):
    return chunked.gla(q, k, v, g_fwd, reverse=False, scale=scale)


def nothing(q, k, v, g_fwd, g_rev, *, scale):
    return torch.full_like(v, torch.nan)


@pytest.mark.parametrize("mistake", [one_direction, nothing])
def test_no_speed_of_a_wrong_model(mistake, tmp_path, monkeypatch, capsys):
    """With the naive layer as the one that is timed and wrong; the chunked one has the logits that are expected."""
    build = bench_models.build

    def with_naive(name, pixels):
        model = build(name, pixels)
        model.backend = "naive"
        return model

    monkeypatch.setattr(bench_models, "build", with_naive)
    monkeypatch.setattr(naive, "bidirectional_gla", mistake)
    monkeypatch.setattr(bench_models, "rates", None)  # nothing is timed
    assert models("--images", "64,2", "--out", str(tmp_path / "out"), "--record", str(tmp_path / "record.json")) == 1
    captured = capsys.readouterr()
    assert "FAILED: eager ViG-T at 64 pixels: an error of " in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_rates_count_images_and_calls(monkeypatch):
    """With a clock that a call moves by 1/16 of a second, and two calls that do not count by a whole one."""
    now, calls = [0.0], []

    def function():
        calls.append(now[0])
        now[0] += 1 if len(calls) < 3 else 0.0625

    monkeypatch.setattr(bench_models, "SECONDS", 0.25)
    monkeypatch.setattr(bench_models.time, "perf_counter", lambda: now[0])
    assert bench_models.rates(function, 8, "cpu") == [8 / 0.0625] * bench_models.ROUNDS
    assert len(calls) == 3 + 1 + 4 * bench_models.ROUNDS


def test_the_table_by_hand():
    def row(model, how, which, images_per_s, mib):
        return {
            "pixels": 224, "batch": 256, "model": model, "how": how, "pass": which, "images_per_s": images_per_s,
            "mib": mib,
        }  # fmt: skip

    rows = [
        row("ViG-T", "eager", "inference", 1000.0, 8.0), row("DeiT-T", "eager", "inference", 4000.0, 16.0),
        row("ViG-T", "compiled", "inference", 3000.0, None), row("DeiT-T", "compiled", "inference", 2000.0, None),
        row("ViG-T", "eager", "training", 100.0, 32.0),
    ]  # fmt: skip
    report = {
        "device": "GPU", "date": "2026-01-01T00", "command": "c", "left_out": "", "rows": rows,
        "versions": {"torch": "1", "triton": "2", "timm": "3"},
    }  # fmt: skip
    text = bench_models.markdown(report)
    assert text.startswith("GPU, torch 1, triton 2, timm 3, 2026-01-01, `c`. Medians of 5 rounds.")
    inference, training = text.split("Training, images a second")
    assert "| 224 | 256 | eager | 1,000 | 4,000 | 0.25 | 8.00 | 16.0 |" in inference
    assert "| 224 | 256 | compiled | 3,000 | 2,000 | 1.5 |  |  |" in inference
    assert training.endswith("| 224 | 256 | eager | 100 |  |  | 32.0 |  |")


@pytest.mark.parametrize("text", ["224", "224,256,3", "0,1", "a,b"])
def test_a_case_that_is_none_is_refused(text, capsys):
    with pytest.raises(SystemExit) as stop:
        models("--images", text)
    assert stop.value.code == 2
    assert f"expected PIXELS,BATCH, such as 224,256; got {text!r}" in capsys.readouterr().err


def test_the_page_in_the_docs_shows_the_record():
    """After a new record: what `vig-ref bench models --report FILE` prints goes between the markers of the page."""
    path = DOCS / "results" / "h200-models.json"
    if not path.exists():
        assert between_markers(path.name) == "Not recorded yet."
        return
    record = json.loads(path.read_text())
    assert between_markers(path.name) == bench_models.markdown(record)
    assert {(r["pixels"], r["batch"]) for r in record["rows"]} <= set(CASES["cuda"])


@pytest.mark.gpu
def test_a_run_on_a_gpu(tmp_path, capsys):
    assert cli.main(["bench", "models", "--device", "cuda", "--images", "64,8", "--out", str(tmp_path)]) == 0
    rows = [r for r in json.loads((tmp_path / "models.json").read_text())["rows"] if r["model"] == "ViG-T"]
    assert {(r["how"], r["pass"]) for r in rows} == {(how, p) for how in ("eager", "compiled") for p in PASSES}
    assert all((r["mib"] is not None) == (r["how"] == "eager") for r in rows)
    assert not re.search("nan|inf", capsys.readouterr().out)
