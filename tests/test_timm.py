"""The models in timm: what timm's own tests/test_models.py asks of every model, asked of ours."""

import json

import pytest
import torch

import fitting_torchvision  # noqa: F401
from test_tables import COMMITTED

timm = pytest.importorskip("timm", reason="needs the extra 'timm'")

import vig_ref.timm  # noqa: E402
from vig_ref import tables  # noqa: E402
from vig_ref.model import PRESETS, ViG, create_model  # noqa: E402

NAMES = sorted(vig_ref.timm.default_cfgs)
SMALL = ("vig_tiny_patch16_224", "vig_h_tiny_patch4_224")


@pytest.fixture(scope="module", params=SMALL)
def model(request):
    torch.manual_seed(0)
    return timm.create_model(request.param, num_classes=42)


def test_every_preset_is_registered():
    assert [name.partition("_patch")[0] for name in NAMES] == sorted(PRESETS)
    assert set(NAMES) <= set(timm.list_models("vig_*"))
    for name in NAMES:
        with torch.device("meta"):
            made, ours = timm.create_model(name), create_model(name.partition("_patch")[0])
        assert type(made) is type(ours)
        assert made.config == ours.config


def test_options_by_timms_names():
    model = timm.create_model(
        "vig_small_patch16_224", num_classes=3, in_chans=1, img_size=(32, 48), drop_path_rate=0.1, backend="naive"
    )
    assert isinstance(model, ViG)
    assert (model.num_classes, model.in_chans, model.grid, model.backend) == (3, 1, (2, 3), "naive")
    assert model.config.drop_path == 0.1


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'qkv_bias'"):
        timm.create_model("vig_tiny_patch16_224", qkv_bias=True)


@pytest.mark.parametrize("name", SMALL)
def test_what_timms_train_script_passes(name):
    """Its defaults: None is dropped by timm, and 0.0 is not."""
    options = {"drop_rate": 0.0, "drop_path_rate": None, "drop_block_rate": None, "global_pool": None}
    with torch.device("meta"):
        assert timm.create_model(name, **options).config == create_model(name.partition("_patch")[0]).config


def test_other_dropout_is_refused():
    message = "drop_rate: expected 0.0, got 0.1; ViG has drop path only: pass drop_path_rate"
    with pytest.raises(ValueError, match=message):
        timm.create_model("vig_tiny_patch16_224", drop_rate=0.1)


def test_there_are_no_weights_to_download():
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("vig_tiny_patch16_224", pretrained=True)


def test_backward(model):
    model.train()
    outputs = model(torch.randn(2, 3, 64, 64))
    assert outputs.shape == (2, 42)
    outputs.mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert outputs.isfinite().all()


def test_default_cfg(model):
    state, cfg = model.state_dict(), model.default_cfg
    assert {f"{cfg['classifier']}.weight", f"{cfg['first_conv']}.weight"} <= state.keys()
    assert state[f"{cfg['first_conv']}.weight"].shape[1] == 3
    assert cfg["input_size"] == (3, 224, 224)


@torch.no_grad()
def test_features_and_classifier(model):
    model.eval()
    x = torch.randn(1, 3, 64, 64)
    features = model.forward_features(x)
    assert features.shape[-1] == model.num_features == model.head_hidden_size
    assert model.forward_head(features, pre_logits=True).shape == (1, model.num_features)
    model.reset_classifier(0)
    assert model(x).shape == (1, model.num_features)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)
    model.reset_classifier(42)
    assert model(x).shape == (1, 42)


@torch.no_grad()
@pytest.mark.parametrize("name", SMALL)
def test_no_head_from_the_start(name):
    x = torch.randn(1, 3, 64, 64)
    assert timm.create_model(name, num_classes=0)(x).dim() == 2
    assert timm.create_model(name, num_classes=0, global_pool="")(x).dim() == 3


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "out_indices", "shapes"),
    [
        ("vig_tiny_patch16_224", None, [(192, 4, 6)] * 4),
        ("vig_tiny_patch16_224", (2, 5), [(192, 4, 6)] * 2),
        ("vig_h_tiny_patch4_224", None, [(96, 16, 24), (192, 8, 12), (384, 4, 6), (768, 2, 3)]),
        ("vig_h_tiny_patch4_224", (-3,), [(192, 8, 12)]),
    ],
)
def test_features_only(name, out_indices, shapes):
    options = {} if out_indices is None else {"out_indices": out_indices}
    torch.manual_seed(0)
    extractor = timm.create_model(name, features_only=True, **options).eval()
    torch.manual_seed(0)
    whole = timm.create_model(name).eval()
    x = torch.randn(1, 3, 64, 96)
    maps = extractor(x)
    assert [tuple(m.shape[1:]) for m in maps] == shapes
    assert extractor.feature_info.channels() == [c for c, _, _ in shapes]
    assert extractor.feature_info.reduction() == [64 // h for _, h, _ in shapes]
    expected = whole.forward_intermediates(x, 4 if out_indices is None else out_indices, intermediates_only=True)
    assert all(torch.equal(m, e) for m, e in zip(maps, expected, strict=True))


def test_timms_optimizer_takes_the_groups(model):
    from timm.optim import create_optimizer_v2

    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    rates = {g["lr_scale"] for g in optimizer.param_groups}
    assert len(rates) == len(model.all_blocks()) + 2  # the stem, each block (the last one with the norm), and the head
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    for name, p in model.named_parameters():
        assert (id(p) in decayed) == (p.dim() > 1 and name != "pos_embed"), name


def test_gradient_checkpointing_by_timms_name(model):
    model.set_grad_checkpointing()
    assert all(block.grad_checkpointing for block in model.all_blocks())
    model.set_grad_checkpointing(enable=False)


def test_timm_models_are_counted():
    """DeiT-T's multiply-accumulates, by hand: patches, 12 blocks of attention over 197 tokens and an MLP, the head."""
    D, T = 192, 197
    by_hand = 196 * 16 * 16 * 3 * D + 12 * (12 * T * D * D + 2 * T * T * D) + D * 1000
    assert tables.size_of(tables.baseline(timm, "deit_tiny_patch16_224"))["macs"] == by_hand
    assert set(tables.figure_4a(timm)) == {"ViG-T", "DeiT-T"}


def test_the_committed_counts_are_timms():
    committed = {row["model"]: row for row in json.loads(COMMITTED.read_text())["table_1"]}
    assert set(committed) == {name for name, *_ in tables.TABLE_1}
    for name in ("deit_small_patch16_224", "convnext_tiny"):
        fresh = tables.size_of(tables.baseline(timm, name))
        assert {key: committed[name][key] for key in fresh} == fresh
