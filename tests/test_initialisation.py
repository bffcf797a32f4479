"""Two ways to begin: one with the global branch off, one with it on, and the command that compares them."""

import dataclasses
import json

import pytest
import torch

from vig_ref import cli, demo, initialisation
from vig_ref.initialisation import life
from vig_ref.model import ViG, create_model, wake
from vig_ref.roadmap import create_row


@pytest.mark.parametrize("name", ["vig_tiny", "vig_h_tiny"])
def test_the_released_start_is_off_and_wake_turns_it_on(name):
    torch.manual_seed(0)
    model, x = create_model(name), torch.randn(1, 3, 64, 64)
    ratios = life(model, x)
    assert len(ratios) == len(model.all_blocks())
    assert max(ratios) < 1e-3
    wake(model)
    assert min(life(model, x)) > 100


def test_life_is_the_mean_square_beside_eps():
    torch.manual_seed(0)
    model, x, seen = create_model("vig_tiny"), torch.randn(1, 3, 32, 32), []
    wake(model)
    model.blocks[0].mixer.norm_o.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ratio = life(model, x)[0]
    assert ratio == pytest.approx(seen[0].double().square().mean().item() / 1e-6)


def test_life_is_that_of_eval_mode_and_leaves_the_model_as_it_was():
    """In training mode, drop path would let few of these blocks through."""
    torch.manual_seed(0)
    model = ViG(dataclasses.replace(demo.CONFIG, depth=4, drop_path=0.9), num_classes=10, img_size=8, in_chans=1)
    wake(model)
    model.blocks[0].eval()
    modes, x = [module.training for module in model.modules()], torch.randn(2, 1, 8, 8)
    ratios = life(model, x)
    assert [module.training for module in model.modules()] == modes
    assert ratios == life(model.eval(), x)


def test_what_wake_changes():
    torch.manual_seed(0)
    model = create_model("vig_tiny")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    wake(model)
    after = model.state_dict()
    changed = {name.partition("mixer.")[2] for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"dwconv.weight", "qkv_proj.weight"}
    spread = model.blocks[3].mixer.qkv_proj.weight.std().item()
    assert spread == pytest.approx((2 / (192 + 384)) ** 0.5, rel=0.02)
    assert model.blocks[3].mixer.dwconv.weight.var().item() == pytest.approx(1 / 27, rel=0.1)


def test_rows_of_the_roadmap_wake_too():
    torch.manual_seed(0)
    model = create_row("direction_wise")
    wake(model)
    assert min(life(model, torch.randn(1, 3, 64, 64))) > 100


def test_gradients_reach_what_lies_before_the_operator():
    """Released, the queries' gradient is nothing beside the local branch's; awake, it is of the same order."""
    shares = []
    for awake in (False, True):
        torch.manual_seed(0)
        model = create_model("vig_tiny", num_classes=10)
        if awake:
            wake(model)
        model(torch.randn(2, 3, 64, 64)).square().sum().backward()
        mixer = model.blocks[6].mixer
        shares.append((mixer.qkv_proj.weight.grad.norm() / mixer.norm_local.weight.grad.norm()).item())
    assert shares[0] < 1e-2 * shares[1]


def test_a_seed_is_of_the_weights_and_of_the_batches(monkeypatch):
    starts = []

    def look(learner, epochs):
        starts.append((learner.model.head.weight.detach().clone(), torch.stack(learner.batches())))
        return []

    monkeypatch.setattr(demo, "train", look)
    for seed in (0, 1, 0):
        assert initialisation.train(demo.load("cpu"), wake, seed, 1)["seed"] == seed
    for zero, one, again in zip(*starts, strict=True):
        assert torch.equal(zero, again)
        assert not torch.equal(zero, one)


def test_the_command_has_a_run_for_each_seed(monkeypatch):
    monkeypatch.setattr(initialisation, "at_the_start", lambda *_: {})
    monkeypatch.setattr(initialisation, "train", lambda data, start, seed, epochs: (start, seed, epochs))
    digits = initialisation.measure(3, 2)["digits"]
    assert digits == {
        which: [(start, seed, 2) for seed in range(3)] for which, start in initialisation.INITIALISATIONS.items()
    }


def test_the_command(tmp_path):
    assert cli.main(["init", "--seeds", "1", "--epochs", "1", "--out", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "initialisation.json").read_text())
    released, awake = data["digits"]["released"][0], data["digits"]["wake"][0]
    assert max(released["life_at_start"]) < 1e-6 < 1 < min(awake["life_at_start"])
    assert len(released["history"]) == len(awake["history"]) == 1
    page = (tmp_path / "initialisation.md").read_text()
    assert f"| test accuracy, epoch 1 | {released['test_accuracy']:.2%}" in page
