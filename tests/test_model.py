"""The model: architecture, sizes, training, dtypes, errors. Its numbers are pinned in test_released.py."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import vig_ref.model
from vig_ref.model import (
    PRESETS,
    DropPath,
    Mixer,
    PatchConv,
    PatchEmbed,
    RMSNorm,
    SwiGLU,
    ViG,
    ViGConfig,
    create_model,
    drop_path_rates,
)

#: The fused layer computes in float64 on the CPU where its kernels are interpreted, that is, without a GPU; with one,
#: tests/test_gpu.py runs it.
BACKENDS = ("naive", "chunked") if torch.cuda.is_available() else ("naive", "chunked", "fused")
#: 16x24 images make 8x12 = 96 tokens, more than one chunk.
TINY = ViGConfig(dim=16, num_heads=2, depth=2, patch_size=2, silu=True)


def tiny(config=TINY, **options):
    """A seeded tiny model in float64 with weights of ordinary size: as initialised, it would hide the global branch."""
    r = torch.Generator().manual_seed(0)
    model = ViG(config, **{"num_classes": 5, "img_size": 16, **options}).double()
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=r, dtype=p.dtype)
            p.copy_(noise / p[0].numel() ** 0.5 if p.dim() > 1 else 1 + 0.1 * noise)
    return model


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "count"), [("vig_tiny", 5_834_536), ("vig_small", 22_615_144), ("vig_base", 89_022_184)]
)
def test_parameter_counts_are_the_released_ones(name, count):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == count
    assert model.config == PRESETS[name]


def test_presets_are_the_released_ones():
    plain = {name: config for name, config in PRESETS.items() if isinstance(config, ViGConfig)}
    rows = {name: (c.dim, c.num_heads, c.depth, c.patch_size, c.drop_path, c.silu) for name, c in plain.items()}
    assert rows == {
        "vig_tiny": (192, 3, 12, 16, 0.0, True),
        "vig_small": (384, 6, 12, 16, 0.2, False),
        "vig_base": (768, 12, 12, 16, 0.5, False),
    }


def test_drop_path_can_be_chosen():
    with torch.device("meta"):
        model = create_model("vig_small", drop_path=0.3)
    assert model.blocks[-1].drop_path.p == pytest.approx(0.3)
    assert create_model("vig_tiny", num_classes=0).blocks[-1].drop_path.p == 0.0


def test_without_a_config_it_is_vig_tiny():
    with torch.device("meta"):
        model = ViG(backend="fused")
    assert model.config == PRESETS["vig_tiny"]
    assert model.backend == "fused"


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(PRESETS["vig_tiny"], "dim", 1)  # noqa: B010


def test_patch_16_has_the_released_stem():
    stem = PatchEmbed(dim=8, patch_size=16, in_chans=3)
    assert (stem.conv1.kernel_size, stem.conv1.stride, stem.conv1.padding) == ((9, 9), (8, 8), (1, 1))
    assert (stem.conv2.kernel_size, stem.conv2.stride, stem.conv2.padding) == ((3, 3), (2, 2), (1, 1))


class Results(TorchDispatchMode):
    """What is computed inside, views left out: the operations and the shapes of their results."""

    def __init__(self):
        super().__init__()
        self.operations, self.shapes = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not function.is_view:
            self.operations.append(function.name())
            self.shapes.append(tuple(result.shape))
        return result


@pytest.mark.parametrize(("in_chans", "kernel_size", "stride"), [(3, 9, 8), (3, 3, 2), (8, 3, 1), (1, 5, 4)])
def test_the_first_convolution_is_a_product(in_chans, kernel_size, stride):
    """Also for images that the stride does not divide. Both sum the same 243 products, or fewer, in another order."""
    conv = PatchConv(in_chans, 6, kernel_size, stride).double()
    x = images(2, in_chans, 21, 34).requires_grad_()
    expected, got = conv(x), conv.as_product(x)
    assert got.shape == expected.shape
    leaves, do = (x, conv.weight, conv.bias), images(*expected.shape)
    gradients = (torch.autograd.grad(y, leaves, do) for y in (expected, got))
    for a, b in ((expected, got), *zip(*gradients, strict=True)):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("device", "in_chans", "products"),
    [("cuda", 3, ["addmm", "convolution"]), ("cuda", 8, ["convolution"] * 2), ("cpu", 3, ["convolution"] * 2)],
)
def test_the_first_convolution_runs_as_a_product_only_on_cuda(device, in_chans, products):
    """Tensors without numbers need no GPU. Rows of 243 numbers are filled up to 248."""
    stem = PatchEmbed(16, 16, in_chans)
    with FakeTensorMode(), Results() as results:
        weights = {name: torch.empty(p.shape, device=device) for name, p in stem.named_parameters()}
        y = torch.func.functional_call(stem, weights, torch.empty(2, in_chans, 32, 48, device=device))
    assert y.shape == (2, 2, 3, 16)
    operations = [name.removeprefix("aten::") for name in results.operations]
    assert [name for name in operations if name in ("addmm", "convolution")] == products
    assert ((2, 4, 6, 248) in results.shapes) == ("addmm" in products)


@pytest.mark.parametrize("patch_size", [2, 4, 6, 8, 16, 32])
def test_a_patch_is_a_token(patch_size):
    stem = PatchEmbed(dim=4, patch_size=patch_size, in_chans=1)
    assert stem(torch.zeros(1, 1, 3 * patch_size, 5 * patch_size)).shape == (1, 3, 5, 4)


@pytest.mark.parametrize("size", [(16, 16), (16, 24), (24, 16), (2, 2)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_agree(backend, size):
    """In float64 layers differ by rounding, about 1e-15 an operation; 1e-9 leaves room for depth and hides no error."""
    model, x = tiny(), images(2, 3, *size)
    model.backend = "naive"
    expected = model(x)
    model.backend = backend
    assert (model(x) - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_share_one_state_dict(backend):
    model, other = tiny(backend="auto"), tiny(backend=backend)
    assert not any("backend" in name for name in other.state_dict())
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(model.state_dict(), strict=True)
    x = images(1, 3, 16, 16)
    torch.testing.assert_close(other(x), model(x), rtol=1e-9, atol=1e-12)


def test_the_backend_of_a_living_model_can_be_changed(monkeypatch):
    used = []
    operator = vig_ref.model.bidirectional_gla
    monkeypatch.setattr(vig_ref.model, "bidirectional_gla", lambda *a, backend: used.append(backend) or operator(*a))
    model = tiny(backend="naive")
    model(images(1, 3, 16, 16))
    model.backend = "chunked"
    model(images(1, 3, 16, 16))
    assert used == ["naive"] * 2 + ["chunked"] * 2
    assert model.backend == "chunked"
    assert {m.backend for m in model.modules() if isinstance(m, (Mixer, SwiGLU))} == {"chunked"}


def test_a_refused_backend_changes_nothing():
    model = tiny(backend="naive")
    with pytest.raises(ValueError, match="unknown backend 'fast'; choose one of"):
        model.backend = "fast"
    assert model.backend == "naive"
    assert {m.backend for m in model.modules() if isinstance(m, (Mixer, SwiGLU))} == {"naive"}
    with pytest.raises(ValueError, match="unknown backend 'fast'; choose one of"):
        ViG(TINY, backend="fast")


def test_the_operator_gets_views_of_the_projections(monkeypatch):
    seen = {}
    operator = vig_ref.model.bidirectional_gla

    def spy(*tensors, backend):
        seen.update(zip(("q", "k", "v", "g_fwd", "g_rev"), tensors, strict=True))
        return operator(*tensors, backend=backend)

    monkeypatch.setattr(vig_ref.model, "bidirectional_gla", spy)
    tiny()(images(3, 3, 16, 24))
    assert {n: tuple(t.shape) for n, t in seen.items()} == {
        "q": (3, 2, 96, 4), "k": (3, 2, 96, 4), "v": (3, 2, 96, 8), "g_fwd": (3, 2, 96, 4), "g_rev": (3, 2, 96, 4),
    }
    assert seen["q"].untyped_storage().data_ptr() == seen["v"].untyped_storage().data_ptr()
    assert seen["g_fwd"].untyped_storage().data_ptr() == seen["g_rev"].untyped_storage().data_ptr()
    assert (seen["g_fwd"] < 0).all()


def test_features_and_head():
    model, x = tiny(), images(2, 3, 16, 24)
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 96, 16)
    torch.testing.assert_close(model.forward_head(tokens), F.linear(tokens.mean(1), model.head.weight, model.head.bias))
    torch.testing.assert_close(model(x), model.forward_head(tokens), rtol=0, atol=0)


def test_no_classes_gives_pooled_features():
    model, x = tiny(num_classes=0), images(2, 3, 16, 16)
    assert not [name for name in model.state_dict() if name.startswith("head")]
    torch.testing.assert_close(model(x), model.forward_features(x).mean(1), rtol=0, atol=0)


def test_image_channels():
    assert tiny(in_chans=1)(images(2, 1, 16, 16)).shape == (2, 5)


def test_position_grid_is_that_of_img_size():
    assert tiny(img_size=(16, 24)).pos_embed.shape == (1, 8 * 12, 16)
    assert tiny(img_size=(16, 24)).resized_pos_embed((8, 12)).shape == (1, 8, 12, 16)


def test_positions_are_resized_along_their_own_axes():
    """What grows along the rows and is constant along the columns stays so."""
    model = tiny()
    ramp = torch.arange(8.0, dtype=torch.float64)[:, None, None].expand(8, 8, 16)
    with torch.no_grad():
        model.pos_embed.copy_(ramp.reshape(1, 64, 16))
    resized = model.resized_pos_embed((16, 4))[0]
    assert (resized == resized[:, :1]).all()
    assert (resized.diff(dim=0) > 0).all()
    torch.testing.assert_close(resized.mean(), ramp.mean())


def test_positions_of_a_half_precision_model_are_resized_in_float32():
    half = tiny().bfloat16()
    single = tiny().bfloat16().float()
    expected = single.resized_pos_embed((5, 7)).bfloat16()
    torch.testing.assert_close(half.resized_pos_embed((5, 7)), expected, rtol=0, atol=0)


def test_training_changes_nothing_without_drop_path():
    model, x = tiny(), images(2, 3, 16, 16)
    torch.testing.assert_close(model.train()(x), model.eval()(x), rtol=0, atol=0)


def test_training_changes_nothing_but_drop_path():
    model, x = tiny(dataclasses.replace(TINY, drop_path=0.9)), images(4, 3, 16, 16)
    expected = model.eval()(x)
    torch.manual_seed(0)
    assert not torch.allclose(model.train()(x), expected)
    for module in model.modules():
        if isinstance(module, DropPath):
            module.p = 0.0
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_drop_path_grows_linearly_over_the_blocks():
    with torch.device("meta"):
        model = create_model("vig_small")
    assert [block.drop_path.p for block in model.blocks] == pytest.approx([0.2 * n / 11 for n in range(12)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_drop_path_does_not_depend_on_the_default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert drop_path_rates(0.3, 4) == [0.3 * n / 3 for n in range(4)]
        assert drop_path_rates(0.3, 1) == [0.0]
    finally:
        torch.set_default_dtype(before)


def test_drop_path_rates_need_no_tensors():
    """Where tensors have no numbers, as in torch.compile's own traces, there are rates all the same."""
    with FakeTensorMode():
        assert drop_path_rates(0.5, 3) == [0.0, 0.25, 0.5]


class Times(torch.nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


def test_drop_path_acts_on_both_branches():
    """And on nothing else: a factor in its place scales the mixer's branch, and then the MLP's."""
    block, x = tiny().blocks[0], images(2, 4, 6, 16)
    block.drop_path = Times(0.25)
    y = x + 0.25 * block.mixer(block.norm1(x))
    y = y + 0.25 * block.mlp(block.norm2(y))
    torch.testing.assert_close(block(x), y)


@pytest.mark.parametrize("silu", [False, True])
def test_the_silus_of_a_mixer_are_there_or_not(silu):
    """By the equations: one behind the depthwise convolution, another one before the output projection."""
    mixer, x = tiny(dataclasses.replace(TINY, silu=silu)).blocks[0].mixer, images(2, 4, 6, 16)
    activation = F.silu if silu else torch.nn.Identity()
    local = F.conv2d(x.permute(0, 3, 1, 2), mixer.dwconv.weight, padding=1, groups=16).permute(0, 2, 3, 1)
    local = activation(local).flatten(1, 2)
    torch.testing.assert_close(mixer.local(x), local)
    z, o = images(2, 24, 16), images(2, 24, 2, 8)
    gate = torch.sigmoid(z)
    y = gate * mixer.norm_o(o).flatten(2) + (1 - gate) * mixer.norm_local(local.unflatten(-1, (2, 8))).flatten(2)
    torch.testing.assert_close(mixer.weigh(z, o, local), activation(y))


def test_drop_path_drops_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(20_000, 2, 3)
    drop = DropPath(0.3)
    y = drop(x)
    kept = y[:, 0, 0] != 0
    torch.testing.assert_close(y, kept[:, None, None] / 0.7 * x)
    assert kept.double().mean() == pytest.approx(0.7, abs=5 * (0.3 * 0.7 / 20_000) ** 0.5)  # five standard deviations
    assert drop.eval()(x) is x


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_parameter_has_a_gradient(backend):
    model = tiny(backend=backend)
    model(images(2, 3, 24, 16)).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert without == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_autocast(backend):
    model = tiny(backend=backend).float()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images(2, 3, 16, 24).float())
        gates = model.blocks[0].mixer.log_gates(torch.ones(1, 1, 16))
    assert logits.dtype == torch.bfloat16
    assert gates.dtype == torch.float32
    logits.float().square().sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_norm_computes_in_the_dtype_of_its_weight_and_returns_that_of_its_input():
    x = images(3, 8).bfloat16()
    expected = F.rms_norm(x.float(), (8,), torch.ones(8), 1e-6).bfloat16()
    torch.testing.assert_close(RMSNorm(8, eps=1e-6)(x), expected, rtol=0, atol=0)


def test_released_initialisation_switches_the_global_branch_off():
    torch.manual_seed(0)
    model, squares = ViG(num_classes=10), []
    for block in model.blocks:
        block.mixer.norm_o.register_forward_pre_hook(lambda _, x: squares.append(x[0].double().square().mean().item()))
    with torch.no_grad():
        assert model(torch.randn(1, 3, 224, 224)).abs().max() > 0
    assert len(squares) == 12
    assert max(squares) < 1e-6 * 1e-9


def test_initial_spread_of_the_weights():
    torch.manual_seed(0)
    state = ViG().state_dict()
    for name, fan in {"qkv_proj": 192 + 384, "dwconv": 9 + 9 * 192, "gate_proj": 384, "forget_proj.0": 208}.items():
        spread = state[f"blocks.3.mixer.{name}.weight"].std().item()
        assert spread == pytest.approx(2**-2.5 * (2 / fan) ** 0.5, rel=0.1), name
    for name in ("pos_embed", "head.weight", "blocks.3.mlp.down_proj.weight"):
        assert state[name].std().item() == pytest.approx(0.02, rel=0.1), name
    assert not any(x.any() for name, x in state.items() if name.endswith("_proj.bias") or name == "head.bias")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "dim: expected a multiple of 2 num_heads, got dim=16, num_heads=3"),
        ({"num_heads": 16}, "dim: expected a multiple of 2 num_heads, got dim=16, num_heads=16"),
        ({"num_heads": 0}, "dim: expected a multiple of 2 num_heads, got dim=16, num_heads=0"),
        ({"dim": 0}, "dim: expected a multiple of 2 num_heads, got dim=0, num_heads=2"),
        ({"drop_path": 1.0}, r"drop_path: expected a probability in \[0, 1\), got 1.0"),
        ({"depth": 0}, "depth: expected at least 1 block, got 0"),
        ({"patch_size": 7}, "patch_size: expected an even number of pixels, got 7"),
        ({"patch_size": 0}, "patch_size: expected an even number of pixels, got 0"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize("size", [(15, 16), (16, 15), (0, 16)])
def test_image_size_errors(size):
    message = f"image size: expected multiples of the patch size 2, got {size[0]}x{size[1]}; resize or pad the images"
    with pytest.raises(ValueError, match=message):
        tiny()(images(1, 3, *size))
    with pytest.raises(ValueError, match=message):
        tiny(img_size=size)


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (3, 16, 16)])
def test_image_shape_errors(shape):
    with pytest.raises(ValueError, match=r"images: expected \[B, 3, height, width\], got \[" + str(shape[0])):
        tiny()(images(*shape))


def test_unknown_model():
    with pytest.raises(ValueError, match=r"unknown model 'vig_huge'; choose one of \('vig_tiny', 'vig_small'"):
        create_model("vig_huge")


def test_create_model_passes_everything_on():
    with torch.device("meta"):
        model = create_model("vig_tiny", backend="naive", num_classes=7, img_size=32, in_chans=1)
    assert (model.backend, model.head.out_features, model.grid, model.in_chans) == ("naive", 7, (2, 2), 1)


def test_a_block_computes_tokens_not_their_grid():
    """With the grid's four dimensions torch.compile would choose a layout that costs a tenth of ViG-T's time at 224."""
    block, x = tiny().blocks[0], images(2, 4, 6, 16)
    with Results() as results:
        block(x)
    assert (2, 24, 16) in results.shapes
    assert (2, 4, 6, 16) not in results.shapes
