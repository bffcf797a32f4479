"""Tables 3 and 5: each row has the paper's parameters and does what its name says; the last one is ViG."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from test_model import TINY, images
from vig_ref import naive
from vig_ref.model import VIG_TINY, Mixer, ViG
from vig_ref.roadmap import GLA_VIM, ROADMAP, ROWS, create_row


def tiny(name, **options):
    """A row as a seeded tiny float64 model with weights of ordinary size."""
    torch.manual_seed(0)
    model = create_row(name, config=TINY, backend="chunked", num_classes=5, img_size=16, **options).double()
    for p in model.parameters():
        nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.dim() > 1 else 1.0)
    return model


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gla", 5_713_384), ("patch_embed", 5_755_816), ("bidirectional", 5_755_816), ("pos_embed", 5_793_448),
        ("direction_wise", 5_813_032), ("gate_2d", 5_834_536), ("fused", 5_834_536), ("gla_vim", 6_697_000),
    ],
)  # fmt: skip
def test_parameter_counts(name, count):
    with torch.device("meta"):
        model = create_row(name)
    assert sum(p.numel() for p in model.parameters()) == count
    assert count / 1e6 == pytest.approx(ROWS[name].paper_params, abs=0.01)


def test_the_rows_are_those_of_the_paper():
    assert [row.paper_params for row in ROADMAP.values()] == [5.72, 5.75, 5.75, 5.79, 5.81, 5.83, 5.83]
    assert GLA_VIM.paper_params == 6.70


@pytest.mark.parametrize("name", ["gate_2d", "fused"])
def test_the_last_rows_are_vig(name):
    torch.manual_seed(0)
    row = create_row(name, backend="chunked", num_classes=3)
    torch.manual_seed(0)
    vig = ViG(backend="chunked", num_classes=3)
    assert type(row) is ViG
    assert row.config == VIG_TINY
    assert [(n, str(m)) for n, m in row.named_modules()] == [(n, str(m)) for n, m in vig.named_modules()]
    x = torch.randn(1, 3, 64, 48)
    with torch.no_grad():
        assert torch.equal(row(x), vig(x))


def test_the_fused_row_asks_for_the_fused_layer():
    with torch.device("meta"):
        assert create_row("fused").backend == "fused"
        assert create_row("gate_2d").backend == "auto"


@pytest.mark.parametrize("name", ROWS)
def test_backends_agree(name):
    model, x = tiny(name), images(2, 3, 16, 24)
    chunked = model(x)
    model.backend = "naive"
    assert (model(x) - chunked).abs().max() <= 1e-9 * chunked.abs().max()


@pytest.mark.parametrize("name", ROWS)
def test_every_parameter_has_a_gradient(name):
    model = tiny(name)
    model(images(2, 3, 16, 16)).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def influence(name, **options):
    """Which tokens the mixer's output at token (3, 4) of an 8x8 grid depends on."""
    mixer = tiny(name, **options).blocks[0].mixer
    x = images(1, 8, 8, 16).requires_grad_()
    (gradient,) = torch.autograd.grad(mixer(x)[0, 3, 4].sum(), x)
    return gradient[0].abs().sum(-1).flatten() > 0


def test_a_causal_mixer_sees_the_past_and_the_others_see_everything():
    t = 3 * 8 + 4
    assert influence("gla").tolist() == [n <= t for n in range(64)]
    assert all(influence(name).all() for name in ROWS if name not in ("gla", "patch_embed"))


def test_a_shared_gate_is_symmetric_and_direction_wise_gates_are_not():
    """Reversing the tokens reverses the output, if both directions do the same."""
    x = images(1, 1, 30, 16)
    for name, symmetric in [("bidirectional", True), ("direction_wise", False), ("gla_vim", False), ("gla", False)]:
        mixer = tiny(name).blocks[0].mixer
        assert torch.allclose(mixer(x.flip(2)).flip(2), mixer(x)) == symmetric, name


def test_rows_without_positions_have_none():
    model = tiny("bidirectional")
    assert not model.pos_embed.any()
    assert "pos_embed" not in model.state_dict()
    assert not model.no_weight_decay()


def test_the_gate_of_two_directions_is_shared_by_value():
    mixer = tiny("bidirectional").blocks[0].mixer
    *_, g_fwd, g_rev = mixer.project(images(1, 4, 16))
    assert torch.equal(g_fwd, g_rev)


@pytest.mark.parametrize("name", ["gla", "bidirectional", "direction_wise", "gla_vim"])
def test_mixers_by_their_equations(name):
    mixer, x = tiny(name).blocks[0].mixer, images(2, 4, 6, 16)
    tokens = x.flatten(1, 2)

    def heads(t):
        return t.unflatten(-1, (2, -1)).transpose(1, 2)  # [B, H, T, n]

    def scan(layer, forget, reverse):
        q, k, v = map(heads, F.linear(tokens, layer.qkv_proj.weight).split((8, 8, 16), dim=-1))
        g = heads(F.logsigmoid(forget) / 16)
        return naive.gla(q, k, v, g, reverse=reverse, scale=4**-0.5)

    forget = mixer.forget_proj(tokens)
    if name == "gla":
        o = scan(mixer, forget, False)
    elif name == "bidirectional":
        o = (scan(mixer, forget, False) + scan(mixer, forget, True)) / 2
    elif name == "direction_wise":
        o = (scan(mixer, forget[..., :8], False) + scan(mixer, forget[..., 8:], True)) / 2
    else:
        o = (scan(mixer, forget, False) + scan(mixer.rev, mixer.rev.forget_proj(tokens), True)) / 2
    torch.testing.assert_close(mixer.scan(tokens), o)
    rms = (o.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    y = F.silu(heads(mixer.gate_proj(tokens))) * o / rms * mixer.norm_o.weight
    out = F.linear(y.transpose(1, 2).flatten(2), mixer.out_proj.weight)
    torch.testing.assert_close(mixer(x), out.unflatten(1, (4, 6)))


def test_one_convolution_makes_patches_that_do_not_overlap():
    stem = tiny("gla").patch_embed
    x = images(1, 3, 4, 6)
    patch = x[0, :, 2:4, 4:6]
    expected = (stem.conv.weight * patch).sum((1, 2, 3)) + stem.conv.bias
    torch.testing.assert_close(stem(x)[0, 1, 2], expected)


def test_unknown_row():
    with pytest.raises(ValueError, match=r"unknown row 'best'; choose one of \('gla', 'patch_embed'"):
        create_row("best")


def test_other_sizes():
    model = create_row("gla", config=dataclasses.replace(TINY, depth=1), in_chans=1, num_classes=2, img_size=8)
    assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 2)


def test_both_layers_of_vim_have_its_backend():
    model = create_row("gla_vim", backend="naive")
    assert {m.backend for m in model.modules() if isinstance(m, Mixer)} == {"naive"}
    model.backend = "chunked"
    assert {m.backend for m in model.modules() if isinstance(m, Mixer)} == {"chunked"}
