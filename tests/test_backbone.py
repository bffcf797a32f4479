"""A model as a part of other programs: maps, heads, memory, export."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import test_hierarchical
import test_model
from vig_ref.model import Block, create_model

FAMILIES = {"plain": test_model.tiny, "hierarchical": test_hierarchical.tiny}


@pytest.fixture(params=FAMILIES)
def model(request):
    return FAMILIES[request.param]()


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_maps_are_what_the_levels_give(model):
    seen = []
    for level in model.levels:
        level.register_forward_hook(lambda _, x, y: seen.append(y))
    x = images(2, 3, 16, 24)
    features, maps = model.forward_intermediates(x)
    assert len(maps) == len(model.levels) == 2
    for m, y, info in zip(maps, seen, model.feature_info, strict=True):
        torch.testing.assert_close(m, y.permute(0, 3, 1, 2), rtol=0, atol=0)
        assert m.shape == (2, info["num_chs"], 16 // info["reduction"], 24 // info["reduction"])
        assert model.get_submodule(info["module"]) in model.levels
    torch.testing.assert_close(features, model.forward_features(x), rtol=0, atol=0)


def test_which_maps(model):
    x = images(1, 3, 16, 16)
    first, last = model.forward_intermediates(x, intermediates_only=True)
    cases = [([1, 0], [last, first]), ([-1], [last]), (1, [last]), (-1, [last]), (-2, [first]), (2, [first, last])]
    for indices, expected in cases:
        maps = model.forward_intermediates(x, indices=indices, intermediates_only=True)
        assert all(torch.equal(m, e) for m, e in zip(maps, expected, strict=True)), indices


def test_map_formats_and_norm(model):
    x = images(1, 3, 16, 24)
    tokens = model.forward_intermediates(x, [-1], norm=True, output_fmt="NLC", intermediates_only=True)[0]
    torch.testing.assert_close(tokens, model.forward_features(x), rtol=0, atol=0)


def test_stopping_early_computes_less(model):
    model.levels[1].register_forward_hook(lambda *_: pytest.fail("the second level ran"))
    tokens, maps = model.forward_intermediates(images(1, 3, 16, 16), [0], stop_early=True)
    torch.testing.assert_close(tokens, maps[0].flatten(2).mT, rtol=0, atol=0)


def test_pruning_keeps_the_maps(model):
    x = images(1, 3, 16, 16)
    expected = model.forward_intermediates(x, [-2], intermediates_only=True)
    taken = model.prune_intermediate_layers([-2], prune_norm=True)
    assert taken == [0]
    assert len(model.levels) == len(model.feature_info) == 1
    assert isinstance(model.norm, nn.Identity)
    assert isinstance(model.head, nn.Identity)
    maps = model.forward_intermediates(x, taken, intermediates_only=True)
    torch.testing.assert_close(maps[0], expected[0], rtol=0, atol=0)


@pytest.mark.parametrize("prune_norm", [False, True])
def test_a_pruned_model_is_a_model_of_what_is_left(model, prune_norm):
    x, trained = images(2, 3, 16, 16), model.norm
    width = model.feature_info[0]["num_chs"]
    (left,) = model.forward_intermediates(x, [0], output_fmt="NLC", intermediates_only=True)
    model.prune_intermediate_layers([0], prune_norm=prune_norm)
    assert model.num_features == model.head_hidden_size == width
    if prune_norm:
        expected = left
    elif isinstance(trained, nn.LayerNorm):  # a new one, of weights 1 and biases 0, for fewer channels
        expected = F.layer_norm(left, (width,), eps=trained.eps)
    else:
        assert model.norm is trained
        expected = trained(left)
    torch.testing.assert_close(model.forward_features(x), expected)
    torch.testing.assert_close(model(x), expected.mean(1))
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_a_head_stays_where_it_fits():
    model, x = test_model.tiny(), images(2, 3, 16, 16)
    head = model.head
    model.prune_intermediate_layers([0], prune_head=False)
    assert model.head is head
    assert model(x).shape == (2, 5)


def test_a_head_that_would_not_fit_is_refused():
    model = test_hierarchical.tiny()
    message = "prune_head: expected True, as the head takes 16 features and 8 are left, got False; prune it, then"
    with pytest.raises(ValueError, match=message):
        model.prune_intermediate_layers([0], prune_head=False)
    assert len(model.levels) == 2
    assert model(images(2, 3, 16, 16)).shape == (2, 5)


@pytest.mark.parametrize("indices", [[2], [-3], []])
def test_levels_that_are_not_there(model, indices):
    with pytest.raises(ValueError, match="indices: expected levels from -2 to 1, got " + re.escape(f"{indices}")):
        model.forward_intermediates(images(1, 3, 16, 16), indices)


@pytest.mark.parametrize("indices", [0, 3, -3, -4, 25])
def test_numbers_of_levels_that_are_not_there(model, indices):
    """The message has the number that came. (-3 was once taken for -1.)"""
    message = f"indices: expected a number of last levels from 1 to 2, or a level from -2 to -1, got {indices}; for"
    with pytest.raises(ValueError, match=message):
        model.forward_intermediates(images(1, 3, 16, 16), indices)
    with pytest.raises(ValueError, match=message):
        model.prune_intermediate_layers(indices)
    assert len(model.levels) == 2


def test_unknown_format(model):
    with pytest.raises(ValueError, match="output_fmt: expected 'NCHW' or 'NLC', got 'NHWC'"):
        model.forward_intermediates(images(1, 3, 16, 16), output_fmt="NHWC")


def test_another_head(model):
    x = images(2, 3, 16, 16)
    tokens = model.forward_features(x)
    model.reset_classifier(7)
    assert model.get_classifier() is model.head
    assert model(x).shape == (2, 7) == (2, model.num_classes)
    assert model.head.weight.dtype == torch.float64
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), tokens.mean(1), rtol=0, atol=0)
    model.reset_classifier(0, global_pool="")
    torch.testing.assert_close(model(x), tokens, rtol=0, atol=0)
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens.mean(1), rtol=0, atol=0)


def test_another_head_is_initialised_as_the_first_one(model):
    torch.manual_seed(0)
    first = type(model)(model.config, num_classes=4000).head
    model.reset_classifier(4000)
    for head in (first, model.head):
        assert head.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert head.weight.mean().item() == pytest.approx(0, abs=5 * 0.02 / head.weight.numel() ** 0.5)
        assert not head.bias.any()


@pytest.mark.parametrize("arguments", [(5, ""), (0, "max")])
def test_poolings_that_are_not_there(model, arguments):
    with pytest.raises(ValueError, match="global_pool: expected 'avg', or '' with num_classes=0, got "):
        model.reset_classifier(*arguments)


def test_no_weight_decay():
    assert test_model.tiny().no_weight_decay() == {"pos_embed"}
    assert test_hierarchical.tiny().no_weight_decay() == set()


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_gives_the_same_gradients_from_less_memory(family):
    """Drop path is on: the second computation must drop what the first one dropped."""
    module = {"plain": test_model, "hierarchical": test_hierarchical}[family]
    model, x = module.tiny(dataclasses.replace(module.TINY, drop_path=0.5)), images(4, 3, 16, 16)

    def run():
        saved = []
        torch.manual_seed(0)
        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            loss = model(x).square().sum()
        loss.backward()
        return [p.grad.clone() for p in model.parameters()], sum(saved)

    gradients, numbers = run()
    model.set_grad_checkpointing()
    again, fewer = run()
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
    assert fewer < numbers / 3
    model.set_grad_checkpointing(False)
    assert run()[1] == numbers


@pytest.fixture(params=FAMILIES)
def shallow(request):
    """For the exporters, which take seconds a block."""
    config = {
        "plain": dataclasses.replace(test_model.TINY, depth=1),
        "hierarchical": dataclasses.replace(test_hierarchical.TINY, depths=(1, 1)),
    }[request.param]
    return FAMILIES[request.param](config).eval()


def test_export_round_trip(shallow, tmp_path):
    """torch.export of the whole model, in the chunked layer, saved, loaded and run."""
    x = images(2, 3, 16, 24)
    torch.export.save(torch.export.export(shallow, (x,)), tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(loaded(x), shallow(x), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch's exporter warns of itself
def test_onnx_round_trip(shallow, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
    pytest.importorskip("onnxscript", reason="needs the extra 'onnx'")
    model, x = shallow.float(), images(2, 3, 16, 10).float()
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "coarse", "count"),
    [("vig_tiny", False, 12), ("vig_tiny", True, 12), ("vig_h_tiny", False, 2 + 2 + 5 + 2), ("vig_h_tiny", True, 4)],
)
def test_the_group_matcher_knows_every_parameter_outside_the_head(name, coarse, count):
    """As timm does, by the first pattern that matches: what its groups capture, then what the pattern adds."""
    with torch.device("meta"):
        model = create_model(name)
    groups, depths = model.group_matcher(coarse), {}
    for name, _ in model.named_parameters():
        found = [(re.match(pattern, name), more) for pattern, more in [(groups["stem"], None), *groups["blocks"]]]
        depths[name] = next(((*map(int, match.groups()), *(more or ())) for match, more in found if match), None)
    assert [name for name, depth in depths.items() if depth is None] == ["head.weight", "head.bias"]
    assert depths.pop("norm.weight") == (99999,)
    within = {name: depth for name, depth in depths.items() if depth and name != "norm.bias"}
    assert len(set(within.values())) == count
    assert list(within.values()) == sorted(within.values())
    assert {name for name, depth in depths.items() if depth == ()} == {
        name for name in depths if name.startswith(("pos_embed", "patch_embed"))
    }


def wrapped(block, how):
    if how == "torch.compile":
        return torch.compile(block, backend="eager")
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(block)


@pytest.mark.parametrize("how", ["torch.compile", "checkpoint_wrapper"])
def test_a_wrapped_block_is_one_block(model, how):
    """Its wrapper answers for the block's attributes, and is none."""
    blocks = model.all_blocks()
    row = model.get_submodule("blocks" if isinstance(model.levels[-1], Block) else "stages.1.blocks")
    row[-1] = wrapped(row[-1], how)
    assert [id(block) for block in model.all_blocks()] == [id(block) for block in blocks]
    model.backend = "naive"
    model.set_grad_checkpointing()
    assert blocks[-1].mixer.backend == "naive"
    assert blocks[-1].grad_checkpointing


def test_the_example_in_the_documentation():
    """docs/backbone.md says what comes out."""
    page = (Path(__file__).parents[1] / "docs" / "backbone.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {}
    exec(program, names)
    assert list(names["model"].forward_features(names["images"]).shape) == [1, 35, 768]
    assert [tuple(m.shape[1:]) for m in names["maps"]] == [(96, 56, 40), (192, 28, 20), (384, 14, 10), (768, 7, 5)]
    assert names["model"].num_classes == 5
    assert names["model"].backend == "naive"
