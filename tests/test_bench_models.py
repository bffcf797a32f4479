"""`vig-ref bench models`: what it measures on a CPU, what its table says, what it refuses to tell."""

import json

import pytest
import torch

import fitting_torchvision  # noqa: F401
from test_bench import shown_record
from vig_ref import bench_models, chunked, cli
from vig_ref.bench_models import CASES, LIMIT, MODELS, PASSES, Case


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
    assert {"device", "versions", "date"} < report.keys()
    assert report["left_out"] == []
    rows = {(r["pixels"], r["batch"], r["model"], r["how"], r["pass"]) for r in report["rows"]}
    assert rows == {(*case, name, "eager", which) for case in ((32, 2), (48, 1)) for name in MODELS for which in PASSES}
    for r in report["rows"]:
        assert 0 < r["low"] <= r["images_per_s"] <= r["high"]
        assert r["mib"] is None
        assert ("error" in r) == (r["model"] == "ViG-T" and r["pass"] == "inference")
        assert r.get("error", LIMIT) <= LIMIT
    assert models("--report", str(record)) == 0
    assert capsys.readouterr().out.strip() in printed


def test_without_timm_there_is_no_peer_and_a_reason(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_models, "import_timm", lambda: (None, "ImportError: none"))
    assert models("--images", "32,1", "--out", str(tmp_path)) == 0
    assert {r["model"] for r in json.loads((tmp_path / "models.json").read_text())["rows"]} == {"ViG-T"}
    assert "\nLeft out: DeiT-T: ImportError: none.\n" in capsys.readouterr().out


def test_a_peer_that_fails_is_left_out_and_so_is_what_memory_does_not_hold(tmp_path, monkeypatch, capsys):
    measured = bench_models.measured

    def failing(case, name, how, which, device):
        if name == "DeiT-T":
            raise ValueError("no such\nkernel")
        if which == "training":
            raise torch.OutOfMemoryError("much")
        return measured(case, name, how, which, device)

    monkeypatch.setattr(bench_models, "measured", failing)
    assert models("--images", "32,1", "--out", str(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "Left out: DeiT-T at 32 pixels, eager inference: ValueError: no such." in printed
    assert "Left out: ViG-T at 32 pixels, eager training: OutOfMemoryError: much." in printed
    monkeypatch.setattr(bench_models, "measured", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        models("--images", "32,1", "--out", str(tmp_path))


def one_direction(q, k, v, g_fwd, g_rev, *, scale):
    return chunked.gla(q, k, v, g_fwd, reverse=False, scale=scale)


def nothing(q, k, v, g_fwd, g_rev, *, scale):
    return torch.full_like(v, torch.nan)


RIGHT = chunked.bidirectional_gla


def last_image_lost(q, k, v, g_fwd, g_rev, *, scale):
    o = RIGHT(q, k, v, g_fwd, g_rev, scale=scale)
    return torch.cat([o[:-1], v[-1:]])


@pytest.mark.parametrize("mistake", [one_direction, nothing, last_image_lost])
def test_no_speed_of_a_wrong_model(mistake, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(chunked, "bidirectional_gla", mistake)
    monkeypatch.setattr(bench_models, "rates", None)  # nothing is timed
    assert models("--images", "64,3", "--out", str(tmp_path / "out"), "--record", str(tmp_path / "record.json")) == 1
    captured = capsys.readouterr()
    assert "FAILED: eager ViG-T at 64 pixels: an error of " in captured.err
    assert "images a second" not in captured.out
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("name", MODELS)
def test_what_is_timed_is_a_pass(name, monkeypatch):
    """Inference in the mode of that name, without gradients; training with one for every parameter, each time anew."""
    seen = []
    build = bench_models.build

    def watched(*arguments):
        model = build(*arguments)
        zero_grad = model.zero_grad
        model.register_forward_hook(lambda *_: seen.append((model.training, torch.is_grad_enabled())))

        def spy(**options):
            seen.append(all(p.grad is not None for p in model.parameters()))
            zero_grad(**options)
            seen.append(all(p.grad is None for p in model.parameters()))

        model.zero_grad = spy
        return model

    def once(function, batch, device):
        seen.clear()
        function()
        return [1.0, 2.0]

    monkeypatch.setattr(bench_models, "build", watched)
    monkeypatch.setattr(bench_models, "rates", once)
    bench_models.measured(Case(32, 2), name, "eager", "inference", "cpu")
    assert seen == [(False, False)]
    bench_models.measured(Case(32, 2), name, "eager", "training", "cpu")
    assert seen == [(True, True), True, True]


@pytest.mark.parametrize(("device", "waits"), [("cpu", 0), ("cuda", 0.5)])
def test_rates_count_images_and_calls(device, waits, monkeypatch):
    """With a clock that a call moves by 1/16 of a second; calls to warm up by a whole one, waiting for a GPU by 1/2."""
    now, calls = [0.0], []

    def function():
        calls.append(now[0])
        now[0] += 1 if len(calls) <= bench_models.WARM_UP else 0.0625

    def synchronize():
        now[0] += 0.5

    monkeypatch.setattr(bench_models, "SECONDS", 4 * 0.5625)
    monkeypatch.setattr(bench_models.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    found = bench_models.rates(function, 8, device)
    calls_a_round = 4 if device == "cuda" else 36
    assert found == [8 * calls_a_round / (0.0625 * calls_a_round + waits)] * bench_models.ROUNDS
    assert len(calls) == bench_models.WARM_UP + 1 + calls_a_round * bench_models.ROUNDS


def test_the_table_by_hand():
    def row(model, how, which, images_per_s, mib):
        return {
            "pixels": 224, "batch": 256, "model": model, "how": how, "pass": which, "low": 0.9 * images_per_s,
            "images_per_s": images_per_s, "high": images_per_s, "mib": mib,
        }  # fmt: skip

    rows = [
        row("ViG-T", "eager", "inference", 1000.0, 8.0), row("DeiT-T", "eager", "inference", 4000.0, 16.0),
        row("ViG-T", "compiled", "inference", 3000.0, None), row("DeiT-T", "compiled", "inference", 2000.0, None),
        row("ViG-T", "eager", "training", 100.0, 32.0),
    ]  # fmt: skip
    report = {
        "device": "GPU", "date": "2026-01-01T00", "command": "c", "left_out": ["DeiT-T: r"], "rows": rows,
        "versions": {"torch": "1", "triton": "2", "timm": "3"},
    }  # fmt: skip
    text = bench_models.markdown(report)
    assert text.startswith("GPU, torch 1, triton 2, timm 3, 2026-01-01, `c`. Medians of rounds.")
    most = "In the row that varies most, ViG-T training at 224, eager, half of the rounds are within 10 % of it."
    assert most in text
    inference, training = text.split("Training, images a second")
    assert "| 224 | 256 | eager | 1,000 | 4,000 | 0.25 | 8.00 | 16.0 |" in inference
    assert "| 224 | 256 | compiled | 3,000 | 2,000 | 1.5 |  |  |" in inference
    assert training.endswith("| 224 | 256 | eager | 100 |  |  | 32.0 |  |\n\nLeft out: DeiT-T: r.")


@pytest.mark.parametrize("text", ["224", "224,256,3", "0,1", "a,b"])
def test_a_case_that_is_none_is_refused(text, capsys):
    with pytest.raises(SystemExit) as stop:
        models("--images", text)
    assert stop.value.code == 2
    assert f"expected PIXELS,BATCH, such as 224,256; got {text!r}" in capsys.readouterr().err


def test_an_image_that_patches_do_not_fill_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        models("--images", "33,1")
    assert stop.value.code == 2
    expected = "expected PIXELS that are a multiple of the patch size 16, such as 224,256; got '33,1'"
    assert f"argument --images: {expected}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "option", "value", "owner"),
    [
        ("ops", "--images", "64,2", "models"), ("limits", "--images", "64,2", "models"),
        ("models", "--shapes", "T224", "ops and limits"), ("traffic", "--shapes", "T224", "ops and limits"),
        ("traffic", "--device", "cpu", "ops, limits and models"), ("traffic", "--out", "x", "ops, limits and models"),
        ("traffic", "--record", "x", "ops, limits and models"), ("traffic", "--report", "x", "ops, limits and models"),
    ],
)  # fmt: skip
def test_an_option_of_the_other_command_is_refused(what, option, value, owner):
    with pytest.raises(SystemExit, match=f"bench {what}: {option} is an option of vig-ref bench {owner}; leave it out"):
        cli.main(["bench", what, option, value])


def test_the_page_in_the_docs_shows_the_record():
    if record := shown_record("h200-models.json", bench_models.markdown):
        rows = record["rows"]
        assert {(r["model"], r["pass"]) for r in rows} == {(name, which) for name in MODELS for which in PASSES}
        assert {(r["pixels"], r["batch"]) for r in rows} <= set(CASES["cuda"])
        assert all(r["error"] <= LIMIT for r in rows if (r["model"], r["pass"]) == ("ViG-T", "inference"))


@pytest.mark.gpu
def test_a_run_on_a_gpu(tmp_path):
    assert cli.main(["bench", "models", "--device", "cuda", "--images", "64,8", "--out", str(tmp_path)]) == 0
    rows = [r for r in json.loads((tmp_path / "models.json").read_text())["rows"] if r["model"] == "ViG-T"]
    assert {(r["how"], r["pass"]) for r in rows} == {(how, p) for how in ("eager", "compiled") for p in PASSES}
    assert all((r["mib"] is not None) == (r["how"] == "eager") for r in rows)
