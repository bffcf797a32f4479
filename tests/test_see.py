"""What the pictures show: maps that are the operator, and fields that are gradients."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from matplotlib.image import imread, imsave
from torch import nn

import fitting_torchvision  # noqa: F401
import test_hierarchical
import test_model
from vig_ref import cli, gla, see
from vig_ref.demo import new_figure
from vig_ref.machine import import_timm
from vig_ref.model import HierarchicalViG, ViG, create_model, wake
from vig_ref.released import released_names
from vig_ref.roadmap import create_row
from vig_ref.tolerance import draw


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("regime", ["vig", "reset"])
def test_a_map_times_v_is_the_operator(reverse, regime):
    x = draw(B=2, H=2, T=33, K=5, V=7, regime=regime, dtype=torch.float64, gate_dtype=torch.float64)
    g = x.g_rev if reverse else x.g_fwd
    A = see.attention_matrix(x.q, x.k, g, reverse=reverse, scale=0.3)
    torch.testing.assert_close(A @ x.v, gla(x.q, x.k, x.v, g, reverse=reverse, scale=0.3, backend="naive"))
    assert not (A.tril(-1) if reverse else A.triu(1)).any()


@pytest.mark.parametrize(("module", "block", "grid"), [(test_model, 1, (8, 12)), (test_hierarchical, -1, (2, 3))])
def test_maps_of_a_model_times_v_are_o(module, block, grid):
    model = module.tiny().eval()
    maps = see.attention_maps(model, module.images(2, 3, 16, 24), block)
    assert maps.grid == grid
    torch.testing.assert_close((maps.fwd + maps.rev) @ maps.v, maps.o)
    assert not maps.fwd.triu(1).any()
    assert not maps.rev.tril(-1).any()


def test_maps_are_those_of_the_block(monkeypatch):
    """The o of the maps is what the block's own norm gets."""
    model, x, seen = test_model.tiny().eval(), test_model.images(1, 3, 16, 16), []
    model.blocks[1].mixer.norm_o.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    maps = see.attention_maps(model, x, 1)
    torch.testing.assert_close(maps.o.transpose(1, 2), seen[0])


def dropping():
    """A model in training mode, some of whose modules are not; drop path would let few of its blocks through."""
    torch.manual_seed(0)
    model = ViG(dataclasses.replace(test_model.TINY, depth=4, drop_path=0.9), img_size=32).double()
    wake(model)
    model.blocks[0].eval()
    return model


def test_maps_and_fields_are_those_of_eval_mode_and_leave_the_model_as_it_was():
    model, x = dropping(), test_model.images(2, 3, 32, 32)
    modes = [module.training for module in model.modules()]
    maps, field = see.attention_maps(model, x, -1), see.effective_receptive_field(model, x)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    assert all(torch.equal(a, b) for a, b in zip(maps[:4], see.attention_maps(model, x, -1)[:4], strict=True))
    assert torch.equal(field, see.effective_receptive_field(model, x))


def test_a_field_is_a_gradient():
    """By a finite difference in one pixel; the middle token of an 8x8 grid is (4, 4)."""
    model, x = test_model.tiny(num_classes=0).eval(), test_model.images(1, 3, 16, 16)

    def middle(image):
        token = model.forward_features(image)[0, 4 * 8 + 4]
        return token @ see.signs(len(token)).double()

    field = see.effective_receptive_field(model, x)
    assert field.max() == 1

    def response(row, column):
        total = 0.0
        for channel in range(3):
            step = torch.zeros_like(x)
            step[0, channel, row, column] = 1e-5
            total += abs((middle(x + step) - middle(x - step)).item() / 2e-5)
        return total

    assert (field[3, 5] / field[9, 8]).item() == pytest.approx(response(3, 5) / response(9, 8), rel=1e-5)


def ends_in_layer_norm():
    return HierarchicalViG(test_hierarchical.TINY)


def stem_ends_in_layer_norm():
    """Of a plain ViG nothing but the path past its blocks, all of which are silent."""
    model = create_row("gate_2d", config=test_model.TINY, img_size=64)
    for parameter in (model.pos_embed, *model.blocks.parameters()):
        nn.init.zeros_(parameter)
    return model


@pytest.mark.parametrize("make", [ends_in_layer_norm, stem_ends_in_layer_norm])
def test_a_field_is_not_rounding(make):
    """Channels behind a LayerNorm sum to a constant: a field of their sum would be noise or, at these widths, 0 / 0."""
    torch.manual_seed(0)
    model, x = make(), test_model.images(1, 3, 64, 64)
    single = see.effective_receptive_field(model.float(), x.float()).double()
    double = see.effective_receptive_field(model.double(), x)
    assert double.mean() > 1e-4
    torch.testing.assert_close(single, double, rtol=0, atol=1e-4)


def test_signs_are_both_and_the_same_at_each_call():
    signs = see.signs(192)
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(signs.mean()) < 0.2
    torch.testing.assert_close(see.signs(192), signs, rtol=0, atol=0)


def test_who_sees_how_far():
    """A causal model sees nothing behind the middle token; the others see the whole image."""
    x = test_model.images(1, 3, 32, 32)

    def field(row):
        torch.manual_seed(0)
        return see.effective_receptive_field(create_row(row, config=test_model.TINY, img_size=32).double(), x)

    assert not field("patch_embed")[20:].any()
    assert (field("direction_wise") > 0).all()
    assert (field("gate_2d") > 0).all()


@pytest.mark.parametrize(("share", "expected"), [(0.5, 0.25), (0.51, 0.5), (1.0, 1.0)])
def test_share_of_pixels(share, expected):
    assert see.share_of_pixels(torch.tensor([[3.0, 1.0], [1.0, 1.0]]), share) == expected


def test_the_photograph(tmp_path):
    image = see.photograph(None, 64)
    assert image.shape == (64, 64, 3)
    assert 0 <= image.min() < 0.1
    assert 0.9 < image.max() <= 1
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 10:30, 0] = 200  # the middle square
    imsave(tmp_path / "picture.png", pixels)
    np.testing.assert_allclose(see.photograph(tmp_path / "picture.png", 8)[..., 0], 200 / 255, atol=1e-3)
    red = (200 / 255 - 0.485) / 0.229
    batch = see.normalised(see.photograph(tmp_path / "picture.png", 8))
    torch.testing.assert_close(batch[0, 0], torch.full((8, 8), red), rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_grey_photograph(tmp_path, monkeypatch, dtype):
    """Matplotlib reads one of a JPEG as bytes and of a PNG as floats, in two dimensions."""
    grey = (np.linspace(0, 255, 32 * 32).reshape(32, 32) / (1 if dtype is np.uint8 else 255)).astype(dtype)
    monkeypatch.setattr(see, "imread", lambda path: grey)
    image = see.photograph(tmp_path, 32)
    assert image.shape == (32, 32, 3)
    np.testing.assert_allclose(image, (grey / (255 if dtype is np.uint8 else 1))[..., None].repeat(3, -1), atol=1e-6)


@pytest.mark.parametrize("what", ["attention", "erf"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [("none.png", "No such file"), ("bad.png", "not a PNG file"), ("bad.jpg", "cannot identify image file")],
)
def test_a_picture_that_cannot_be_read_is_refused(tmp_path, what, name, reason):
    for bad in ("bad.png", "bad.jpg"):
        (tmp_path / bad).write_text("no picture")
    with pytest.raises(SystemExit) as error:
        cli.main(["see", what, "--image", str(tmp_path / name), "--out", str(tmp_path / "out")])
    text = str(error.value)
    assert text.startswith(f"vig-ref see: image: expected a picture, got {tmp_path / name} (")
    assert reason in text
    assert text.endswith("); give another file")


@pytest.mark.parametrize("size", ["0", "-16"])
def test_a_size_that_is_none_is_refused(size, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["see", "erf", "--size", size])
    assert stop.value.code == 2
    assert f"argument --size: expected a whole number of at least 1, got '{size}'" in capsys.readouterr().err


def test_weights_that_are_not_there_or_none_are_refused(tmp_path):
    torch.save([1], tmp_path / "list.pth")
    for name, reason in (("none.pth", "No such file"), ("none.safetensors", "No such file"), ("list.pth", "got list")):
        with pytest.raises(SystemExit) as error:
            cli.main(["see", "attention", "--size", "32", "--weights", str(tmp_path / name), "--out", str(tmp_path)])
        text = str(error.value)
        assert text.startswith("vig-ref see: weights: expected a released checkpoint (")
        assert reason in text
        assert text.endswith("); give its file")


def test_what_is_drawn_of_each_token(tmp_path, monkeypatch):
    """The frame is around the token, and its three maps lie over the whole picture, in colours of one scale."""
    figures = []
    monkeypatch.setattr(see, "new_figure", lambda *size: figures.append(new_figure(*size)) or figures[-1])
    fwd, rev = torch.randn(2, 2, 3, 12, 12)  # two images, three heads, a grid of 3x4
    maps = see.Maps(fwd, rev, torch.empty(0), torch.empty(0), (3, 4))
    image, tokens, head = np.random.default_rng(0).random((24, 32, 3)), [(0, 1), (2, 3)], 1
    see.draw_attention(image, maps, tokens, head, "title", tmp_path / "maps.png")
    for (row, column), axes in zip(tokens, np.reshape(figures[0].axes[:8], (2, 4)), strict=True):
        t = 4 * row + column
        drawn = [fwd[0, head, t], rev[0, head, t], fwd[0, head, t] + rev[0, head, t]]
        assert np.array_equal(axes[0].images[0].get_array(), image)
        for ax, weights in zip(axes[1:], drawn, strict=True):
            grey, colours = ax.images
            np.testing.assert_array_equal(grey.get_array(), image.mean(-1))
            np.testing.assert_array_equal(colours.get_array(), weights.reshape(3, 4).numpy())
            assert colours.get_extent() == [-0.5, 31.5, 23.5, -0.5]
            assert colours.norm is axes[1].images[1].norm
        for ax in axes:
            for frame in ax.patches:
                assert frame.get_bbox().bounds == (8 * column - 0.5, 8 * row - 0.5, 8, 8)
            assert len(ax.patches) == 2
        assert axes[0].get_ylabel() == f"token ({row}, {column})"
    assert [ax.get_title() for ax in figures[0].axes[:4]] == ["photograph", "forward", "reverse", "merged"]


def test_attention_command(tmp_path):
    arguments = ["--size", "64", "--block", "0", "--token", "1", "2", "--token", "3", "0", "--out", str(tmp_path)]
    assert cli.main(["see", "attention", *arguments]) == 0
    pixels = imread(tmp_path / "attention.png")[..., :3]
    assert pixels.std() > 0.05


def test_attention_command_with_weights(tmp_path):
    torch.manual_seed(0)
    model = create_model("vig_tiny", num_classes=2)
    names = released_names(model)
    torch.save({"model": {names[n]: x for n, x in model.state_dict().items()}}, tmp_path / "vig_t.pth")
    arguments = ["--size", "32", "--weights", str(tmp_path / "vig_t.pth"), "--out", str(tmp_path)]
    assert cli.main(["see", "attention", *arguments]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--block", "12"], "vig-ref see: block: expected -12 to 11, got 12"),
        (["--head", "3"], "vig-ref see: head: expected 0 to 2, got 3"),
        (["--token", "2", "0"], "vig-ref see: token: expected a row and a column of the 2x2 grid, got 2 0"),
        (["--model", "vig_small", "--weights", "w.pth"], "vig-ref see: the weights say which model they are of; give"),
        (["--size", "30"], "vig-ref see: image size: expected multiples of the patch size 16, got 30x30"),
    ],
)
def test_attention_errors(tmp_path, arguments, message):
    with pytest.raises(SystemExit) as error:
        cli.main(["see", "attention", "--size", "32", *arguments, "--out", str(tmp_path)])
    assert str(error.value).startswith(message)


def test_five_fields_stand_in_two_rows(tmp_path):
    see.draw_fields({f"model {n}": torch.rand(8, 8) for n in range(5)}, "five", tmp_path / "five.png")
    height, width = imread(tmp_path / "five.png").shape[:2]
    assert 0.6 < height / width < 1  # a phone shows it as large as one row of three


def test_erf_refuses_what_is_of_attention_only(tmp_path):
    with pytest.raises(SystemExit, match="draws five models of its own, untrained, and takes no --weights, --block"):
        cli.main(["see", "erf", "--size", "32", "--weights", "w.pth", "--block", "0", "--out", str(tmp_path)])


def test_a_field_is_the_same_with_and_without_timm():
    timm, reason = import_timm()
    assert timm, reason
    x = torch.randn(1, 3, 32, 32)
    found, alone = see.fields(32, x, timm), see.fields(32, x, None)
    assert list(found) == [*see.PEERS, *alone]
    assert all(torch.equal(found[name], field) for name, field in alone.items())


def test_erf_sees_the_photograph_in_all_four_rotations(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(see, "fields", lambda n, images, timm: seen.append(images) or {"ViG": torch.rand(n, n)})
    assert cli.main(["see", "erf", "--size", "32", "--out", str(tmp_path)]) == 0
    upright = see.normalised(see.photograph(None, 32))[0]
    assert torch.equal(seen[0], torch.stack([upright.rot90(n, (1, 2)) for n in range(4)]))


def test_erf_command_without_timm(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(see, "import_timm", lambda: (None, "absent"))
    assert cli.main(["see", "erf", "--size", "32", "--out", str(tmp_path)]) == 0
    assert "Left out: ResNet50 and DeiT-T: absent.\n" in capsys.readouterr().out
    found = json.loads((tmp_path / "erf.json").read_text())["share_of_pixels_that_hold"]
    assert list(found) == ["GLA", "BidGLA (no 2D gate)", "ViG"]
    assert found["ViG"]["0.5"] < found["ViG"]["0.9"] < found["ViG"]["0.99"] <= 1
    assert imread(tmp_path / "erf.png")[..., :3].std() > 0.05
