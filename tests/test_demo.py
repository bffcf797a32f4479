"""The demo, shortened but real: its files, its numbers, and that it fails when something is wrong."""

import argparse
import json
import math

import matplotlib.image
import numpy as np
import pytest
import torch

from vig_ref import agreement, chunked, demo
from vig_ref.tolerance import NAMES, REGIMES


def options(out, epochs=1, device="cpu"):
    return argparse.Namespace(device=device, out=out, epochs=epochs)


@pytest.fixture
def without_fused(monkeypatch):
    """For tests of something else: saves the ten seconds of the interpreter."""
    monkeypatch.setattr(agreement, "compare_fused", lambda device: [])


@pytest.fixture(scope="module")
def data():
    return demo.load("cpu")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One real run of two epochs, all three layers: its exit code and its folder."""
    out = tmp_path_factory.mktemp("demo") / "made" / "by the demo"
    return demo.run(options(out, epochs=2)), out


def test_a_run_succeeds_and_writes_its_summary(finished):
    code, out = finished
    assert code == 0
    summary = json.loads((out / "summary.json").read_text())
    assert {"test_accuracy", "seconds", "agreement", "versions", "device", "date", "command"} <= summary.keys()
    assert 0.2 < summary["test_accuracy"] <= 1  # two epochs are enough to be better than guessing
    assert summary["test_accuracy"] == summary["history"][-1]["test_accuracy"]
    torch_version = summary["versions"]["torch"].partition("+")[0]
    assert torch_version == torch.__version__.partition("+")[0]  # PyPI's packages do not say which CUDA
    assert summary["first_steps"]["agree"]
    assert len(summary["history"]) == 2


def test_every_layer_is_compared_in_every_regime(finished):
    rows = json.loads((finished[1] / "summary.json").read_text())["agreement"]["rows"]
    seen = {(row["layer"], row["regime"]) for row in rows}
    layers = ("naive, float32", "chunked, float32", "fused (Triton interpreter), float32")
    assert seen == {(layer, regime) for layer in layers for regime in REGIMES}
    for row in rows:
        assert tuple(row["ratios"]) == NAMES
        assert all(0 <= ratio <= 1 for ratio in row["ratios"].values())
        assert math.isclose(row["error"], row["ratios"][row["worst"]] * row["bound"], rel_tol=1e-6)


@pytest.mark.parametrize("name", ["training.png", "digits.png"])
def test_the_pictures_show_something(finished, name):
    pixels = matplotlib.image.imread(finished[1] / name)[..., :3]
    assert min(pixels.shape[:2]) > 500
    assert (pixels == 1).all(-1).mean() < 0.97  # not a blank page
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def test_wrong_answers_are_marked(data, tmp_path):
    orange = np.array([0xD5, 0x5E, 0x00]) / 255
    marked = {}
    for wrong in (0, 2):
        answers = data.y_test.clone()
        answers[5 : 5 + wrong] = (answers[5 : 5 + wrong] + 1) % 10
        demo.draw_answers(data, answers, tmp_path / "digits.png")
        pixels = matplotlib.image.imread(tmp_path / "digits.png")[..., :3]
        marked[wrong] = int((np.abs(pixels - orange) < 0.01).all(-1).sum())
    assert marked[0] == 0
    assert marked[2] > 1000


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_a_layer_wrong_by_one_percent_fails_the_demo(factor, monkeypatch, tmp_path, capsys, without_fused):
    right = chunked.bidirectional_gla
    monkeypatch.setattr(chunked, "bidirectional_gla", lambda *x, **o: factor * right(*x, **o))
    monkeypatch.setattr(demo, "train", lambda learner, epochs: [{"epoch": 1, "loss": 1.0, "test_accuracy": 0.5}])
    assert demo.run(options(tmp_path)) == 1
    captured = capsys.readouterr()
    assert "THE LAYERS DISAGREE" in captured.out
    assert "FAILED: a layer is further from the float64 oracle than its arithmetic allows" in captured.err


def test_nan_is_not_agreement(monkeypatch, without_fused):
    right = chunked.bidirectional_gla
    monkeypatch.setattr(chunked, "bidirectional_gla", lambda *x, **o: right(*x, **o) * math.nan)
    result = agreement.compare_all()
    assert not result["agree"]
    assert "THE LAYERS DISAGREE" in agreement.table(result)


RIGHT = chunked.bidirectional_gla
MISTAKES = {
    "gates swapped": lambda q, k, v, g_fwd, g_rev, **o: RIGHT(q, k, v, g_rev, g_fwd, **o),
    "one gate 1 % too strong": lambda q, k, v, g_fwd, g_rev, **o: RIGHT(q, k, v, g_fwd, 1.01 * g_rev, **o),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_side_by_side_notices_a_mistake_that_learns_as_well(mistake, data, monkeypatch):
    monkeypatch.setattr(chunked, "bidirectional_gla", MISTAKES[mistake])
    result = demo.side_by_side(data, ("naive", "chunked"))
    assert not result["agree"]
    assert all(step["difference"] > 1e3 * step["bound"] for step in result["steps"])


def test_too_few_right_answers_fail_a_full_run_only(tmp_path, capsys):
    summary = {
        "test_accuracy": 0.96, "test_accuracy_without_global_branch": 0.5, "seconds": 1.0, "device": "cpu",
        "agreement": {"agree": True}, "first_steps": {"agree": True},
    }  # fmt: skip
    assert demo.report(summary, options(tmp_path, epochs=demo.EPOCHS)) == 1
    assert "FAILED: the accuracy is under 97%" in capsys.readouterr().err
    assert demo.report(summary, options(tmp_path, epochs=1)) == 0
    assert demo.report(summary | {"test_accuracy": 0.97}, options(tmp_path, epochs=demo.EPOCHS)) == 0


def test_without_triton_the_table_says_so(monkeypatch):
    monkeypatch.setattr(agreement, "has_triton", lambda: False)
    result = agreement.compare_all()
    assert result["agree"]
    assert {row["layer"] for row in result["rows"]} == {"naive, float32", "chunked, float32"}
    assert result["missing"] == {"fused": agreement.NO_TRITON}
    assert "fused: not run, because Triton is not installed" in agreement.table(result)


def test_a_failing_fused_process_is_an_error(monkeypatch):
    monkeypatch.setattr(agreement.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="the fused layer could not be compared"):
        agreement.compare_fused("cpu")


def test_the_table_fits_the_terminal(without_fused):
    result = agreement.compare_all()
    for row in result["rows"]:
        row["ratios"] = dict.fromkeys(NAMES, 1.2e-12)  # the widest number
    assert max(map(len, agreement.table(result).splitlines())) <= 100


def test_the_split_is_fixed_and_disjoint(data):
    again = demo.load("cpu")
    assert all(torch.equal(one, two) for one, two in zip(data, again, strict=True))
    assert len(data.x_test) == 360
    assert len(data.x) == 1437
    train = {image.numpy().tobytes() for image in data.x}
    assert not any(image.numpy().tobytes() in train for image in data.x_test)
    assert data.x.min() == -1
    assert data.x.max() == 1


def test_jitter_moves_the_ink_a_little(data):
    x = data.x[:64]
    moved = demo.jitter(x, torch.Generator().manual_seed(0))
    assert moved.shape == x.shape
    assert moved.min() >= -1 - 1e-6
    assert moved.max() <= 1 + 1e-6
    change = (moved - x).abs().mean((1, 2, 3))
    assert (change > 0.01).all()
    similarity = torch.nn.functional.cosine_similarity((moved + 1).flatten(1), (x + 1).flatten(1))
    assert similarity.mean() > 0.8


def test_without_the_global_branch_the_rest_is_unchanged(data):
    """o = 0 is a norm behind the operator whose weights are 0; and it is 0 for that one question only."""
    learner = demo.Learner(data, backend="chunked", steps=22)
    for batch in learner.batches():
        learner.step(batch)
    before = learner.answers()
    without = learner.accuracy_without_global_branch()
    assert torch.equal(before, learner.answers())
    assert without != learner.accuracy()
    for mixer in demo.mixers(learner.model):
        torch.nn.init.zeros_(mixer.norm_o.weight)
    assert without == learner.accuracy()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="--device cuda needs an NVIDIA GPU"):
        demo.run(options(tmp_path, device="cuda"))


@pytest.mark.gpu
def test_the_demo_on_a_gpu(tmp_path):
    assert demo.run(options(tmp_path, device="cuda")) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["backend"] == "fused"
    assert any("compiled" in row["layer"] and "bfloat16" in row["layer"] for row in summary["agreement"]["rows"])
