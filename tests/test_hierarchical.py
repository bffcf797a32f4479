"""ViG-H: the parts that differ from the plain ViG, image sizes, released names. The mixer is that of test_model.py."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from vig_ref.model import (
    PRESETS,
    Downsample,
    HierarchicalConfig,
    HierarchicalViG,
    Mixer,
    PatchEmbed,
    SwiGLU,
    create_model,
)
from vig_ref.released import load_released, released_names

interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="the compiled layer takes no float64")
TINY = HierarchicalConfig(dims=(8, 16), num_heads=(1, 2), depths=(1, 2))


def tiny(config=TINY, **options):
    """A seeded tiny model in float64 with weights of ordinary size."""
    r = torch.Generator().manual_seed(0)
    model = HierarchicalViG(config, **{"num_classes": 5, **options}).double()
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=r, dtype=p.dtype)
            p.copy_(noise / p[0].numel() ** 0.5 if p.dim() > 1 else 1 + 0.1 * noise)
    return model


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "count"), [("vig_h_tiny", 28_600_680), ("vig_h_small", 50_051_688), ("vig_h_base", 88_904_360)]
)
def test_parameter_counts_are_the_released_ones(name, count):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == count


def test_presets_are_the_released_ones():
    rows = {n: dataclasses.astuple(c) for n, c in PRESETS.items() if isinstance(c, HierarchicalConfig)}
    assert rows == {
        "vig_h_tiny": ((96, 192, 384, 768), (3, 6, 12, 24), (2, 2, 5, 2), 0.2),
        "vig_h_small": ((96, 192, 384, 768), (3, 6, 12, 24), (2, 2, 17, 2), 0.3),
        "vig_h_base": ((128, 256, 512, 1024), (4, 8, 16, 32), (2, 2, 17, 2), 0.6),
    }


def test_one_mixer_for_both_families():
    with torch.device("meta"):
        mixers = [m for m in create_model("vig_h_tiny").modules() if isinstance(m, Mixer)]
    assert [m.dim for m in mixers] == [96] * 2 + [192] * 2 + [384] * 5 + [768] * 2
    assert [m.num_heads for m in mixers] == [3] * 2 + [6] * 2 + [12] * 5 + [24] * 2
    assert not any(m.silu for m in mixers)


def test_the_stem_and_the_downsampling_by_their_equations():
    torch.manual_seed(0)
    stem, down, x = PatchEmbed(8, 4, 3, F.gelu).double(), Downsample(8, 16).double(), images(2, 3, 9, 14)
    y = F.conv2d(x, stem.conv1.weight, stem.conv1.bias, stride=2, padding=1)
    y = F.gelu(F.layer_norm(y.permute(0, 2, 3, 1), (4,), stem.norm1.weight, stem.norm1.bias, 1e-5)).permute(0, 3, 1, 2)
    y = F.conv2d(y, stem.conv2.weight, stem.conv2.bias, stride=2, padding=1)
    y = F.layer_norm(y.permute(0, 2, 3, 1), (8,), stem.norm2.weight, stem.norm2.bias, 1e-5)
    torch.testing.assert_close(stem(x), y)
    z = F.conv2d(y.permute(0, 3, 1, 2), down.conv.weight, down.conv.bias, stride=2, padding=1).permute(0, 2, 3, 1)
    torch.testing.assert_close(down(y), F.layer_norm(z, (16,), down.norm.weight, down.norm.bias, 1e-5))


def test_the_stem_of_a_model_has_gelu():
    """The plain ViG's has SiLU."""
    stem, x = tiny().patch_embed, images(2, 3, 9, 14)
    expected = PatchEmbed(8, 4, 3, F.gelu).double()
    expected.load_state_dict(stem.state_dict())
    torch.testing.assert_close(stem(x), expected(x), rtol=0, atol=0)


def test_mixers_apply_no_silu():
    """The local branch is linear in the tokens, and the weighed sum of both is odd in them: with a SiLU neither is."""
    for block in tiny().all_blocks():
        mixer = block.mixer
        x, y = images(2, 2, 3, mixer.dim).split(1)
        torch.testing.assert_close(mixer.local(2 * x - y), 2 * mixer.local(x) - mixer.local(y))
        z, o, local = images(3, 6, mixer.dim).split(1)
        o = mixer.split_heads(o)
        torch.testing.assert_close(mixer.weigh(z, -o, -local), -mixer.weigh(z, o, local))


def test_the_model_by_its_equations():
    model, x = tiny().eval(), images(2, 3, 16, 24)

    def norm(layer, x):
        return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, 1e-5)

    y = model.patch_embed(x)
    for n, stage in enumerate(model.stages):
        y = stage.downsample(y) if n else y
        for block in stage.blocks:
            y = y + block.mixer(norm(block.norm1, y))
            gate, up = F.linear(norm(block.norm2, y), block.mlp.gate_up_proj.weight).chunk(2, -1)
            y = y + F.linear(F.silu(gate) * up, block.mlp.down_proj.weight)
    y = norm(model.norm, y).mean((1, 2))
    torch.testing.assert_close(model(x), F.linear(y, model.head.weight, model.head.bias))


@pytest.mark.parametrize(("dim", "hidden"), [(96, 256), (128, 352), (256, 704), (512, 1376), (1024, 2752)])
def test_mlp_widths_are_the_released_ones(dim, hidden):
    with torch.device("meta"):
        assert SwiGLU(dim, multiple_of=32).down_proj.in_features == hidden


@pytest.mark.parametrize("size", [(32, 32), (33, 30), (7, 50), (1, 1)])
def test_a_stage_has_a_token_for_every_4_8_pixels_rounded_up(size):
    maps = tiny().forward_intermediates(images(1, 3, *size), intermediates_only=True)
    for m, pixels in zip(maps, (4, 8), strict=True):
        assert m.shape[2:] == tuple(-(-n // pixels) for n in size)


def test_padding_the_image_with_zeros_gives_other_values_on_the_same_grid():
    """So the rule is the convolutions' own padding, and nothing happens to the image."""
    model, x = tiny(), images(1, 3, 30, 30)
    padded = model.embed(F.pad(x, (0, 2, 0, 2)))
    assert padded.shape == model.embed(x).shape
    assert not torch.allclose(padded, model.embed(x))
    torch.testing.assert_close(padded[:, :6, :6], model.embed(x)[:, :6, :6])


@pytest.mark.parametrize("size", [(32, 32), (37, 50)])
@pytest.mark.parametrize("backend", ["chunked", pytest.param("fused", marks=interpreter)])
def test_backends_agree(backend, size):
    model, x = tiny(), images(2, 3, *size)
    model.backend = "naive"
    expected = model(x)
    model.backend = backend
    assert (model(x) - expected).abs().max() <= 1e-9 * expected.abs().max()
    assert {m.backend for m in model.modules() if isinstance(m, Mixer)} == {backend}


@pytest.mark.parametrize("config", [TINY, dataclasses.replace(TINY, depths=(1, 1))], ids=["1+2", "1+1"])
def test_every_parameter_has_a_gradient(config):
    model = tiny(config)
    model(images(2, 3, 24, 17)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_drop_path_grows_over_all_blocks():
    with torch.device("meta"):
        model = create_model("vig_h_tiny")
    assert [block.drop_path.p for block in model.all_blocks()] == pytest.approx([0.2 * n / 10 for n in range(11)])


def test_initial_spread_of_the_weights():
    torch.manual_seed(0)
    state = create_model("vig_h_tiny").state_dict()
    block = "stages.2.blocks.1"
    for name in ("mixer.qkv_proj", "mixer.gate_proj", "mixer.out_proj", "mlp.gate_up_proj"):
        assert state[f"{block}.{name}.weight"].std().item() == pytest.approx(0.02, rel=0.05), name
    spread = 2**-2.5 * (2 / (9 + 9 * 384)) ** 0.5
    assert state[f"{block}.mixer.dwconv.weight"].std().item() == pytest.approx(spread, rel=0.1)
    assert not any(x.any() for name, x in state.items() if name.endswith("_proj.bias") or name == "head.bias")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": (1,)}, r"dims, num_heads, depths: expected one entry a stage in each, got \(8, 16\), \(1, 2\)"),
        ({"dims": (8, 15)}, "dim: expected a multiple of 2 num_heads, got dim=15, num_heads=2"),
        ({"drop_path": -0.1}, r"drop_path: expected a probability in \[0, 1\), got -0.1"),
        ({"depths": (1, 0)}, "depth: expected at least 1 block, got 0"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_image_errors():
    with pytest.raises(ValueError, match="image size: expected at least one pixel, got 0x8"):
        tiny()(images(1, 3, 0, 8))
    with pytest.raises(ValueError, match=r"images: expected \[B, 3, height, width\], got \[1, 2, 8, 8\]"):
        tiny()(images(1, 2, 8, 8))


def released_state(name="vig_h_tiny"):
    torch.manual_seed(0)
    model = create_model(name, num_classes=3)
    names = released_names(model)
    return model, {names[ours]: x for ours, x in model.state_dict().items()}


def test_released_names():
    """Spelled out for one of each kind, as the modules of the released `HierViG` are called."""
    _, state = released_state()
    expected = {
        "patch_embed.0.weight": [48, 3, 3, 3], "patch_embed.2.bias": [48], "patch_embed.5.weight": [96, 48, 3, 3],
        "patch_embed.7.weight": [96], "layers.0.downsample.1.weight": [192, 96, 3, 3],
        "layers.2.downsample.3.bias": [768], "layers.2.blocks.4.norm.bias": [384],
        "layers.2.blocks.4.norm2.weight": [384],
        "layers.1.blocks.1.op.in_proj.0.weight": [192, 1, 3, 3], "layers.1.blocks.1.op.qkv_proj.weight": [384, 192],
        "layers.1.blocks.1.op.gk_proj.0.weight": [16, 192], "layers.1.blocks.1.op.gk_proj.1.bias": [192],
        "layers.1.blocks.1.op.g_proj.bias": [192], "layers.1.blocks.1.op.o_proj.weight": [192, 192],
        "layers.1.blocks.1.op.g_norm.weight": [32], "layers.1.blocks.1.op.l_norm.weight": [32],
        "layers.3.blocks.0.mlp.fc1.weight": [4096, 768], "layers.3.blocks.0.mlp.fc2.weight": [768, 2048],
        "classifier.norm.weight": [768], "classifier.head.weight": [3, 768], "classifier.head.bias": [3],
    }  # fmt: skip
    assert {name: list(state[name].shape) for name in expected} == expected
    assert len(state) == 12 + 3 * 4 + 11 * 16


def test_released_weights_give_the_same_model():
    model, state = released_state()
    loaded = load_released({"model_ema": {f"module.{name}": x for name, x in state.items()}})
    assert loaded.config == PRESETS["vig_h_tiny"]
    x = torch.randn(1, 3, 40, 33)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model.eval()(x), rtol=0, atol=0)


def test_released_inference_is_the_same_function():
    _, state = released_state()
    model = load_released(state, released_inference=True)
    assert {m.norm_o.eps for m in model.modules() if isinstance(m, Mixer)} == {1e-6}


def test_linear_layers_saved_as_convolutions():
    _, state = released_state()
    key = "layers.1.blocks.1.op.qkv_proj.weight"
    loaded = load_released({**state, key: state[key][:, :, None, None]})
    assert torch.equal(loaded.stages[1].blocks[1].mixer.qkv_proj.weight, state[key])


def test_names_from_before_are_listed():
    _, state = released_state()
    state["layers.0.blocks.0.ln_1.weight"] = state.pop("layers.0.blocks.0.norm.weight")
    with pytest.raises(ValueError, match="2 entries do not fit") as error:
        load_released(state)
    assert set(str(error.value).split("\n  ")[1:]) == {
        "layers.0.blocks.0.ln_1.weight: unknown", "layers.0.blocks.0.norm.weight: missing, expected [96]",
    }  # fmt: skip
