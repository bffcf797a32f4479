"""Models to and from folders and the Hub."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import test_hierarchical
import test_model
from vig_ref.model import create_model
from vig_ref.released import load_released, released_names
from vig_ref.roadmap import create_row
from vig_ref.weights import load, save

FAMILIES = {"plain": test_model.tiny, "hierarchical": test_hierarchical.tiny}


@pytest.fixture(params=FAMILIES)
def model(request):
    return FAMILIES[request.param](in_chans=1, img_size=(16, 24), num_classes=3)


def equal(a, b):
    """The same sizes and, bit for bit, the same weights; so also the same function, up to the alignment of memory."""
    x = torch.randn(1, 1, 16, 24, dtype=torch.float64)
    ours, theirs = a.state_dict(), b.state_dict()
    same = type(a) is type(b) and a.options() == b.options() and ours.keys() == theirs.keys()
    return same and all(torch.equal(ours[n], theirs[n]) for n in ours) and torch.allclose(a(x), b(x), rtol=1e-12)


def test_round_trip(model, tmp_path):
    save(model, tmp_path / "new" / "folder")
    loaded = load(tmp_path / "new" / "folder", backend="naive")
    assert loaded.backend == "naive"
    assert not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())
    loaded.backend = model.backend
    assert equal(loaded, model.eval())


def test_what_is_written(model, tmp_path):
    save(model, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


def test_a_row_of_the_roadmap_is_refused(tmp_path):
    row = create_row("gla", config=test_model.TINY, img_size=16)
    with pytest.raises(ValueError, match="model: expected the parameters of a ViG of this config; missing, unknown or"):
        save(row, tmp_path)


def test_the_pooling_comes_back(model, tmp_path):
    model.reset_classifier(0, "")
    save(model, tmp_path)
    loaded = load(tmp_path)
    assert loaded.global_pool == ""
    assert equal(loaded, model.eval())


def test_a_folder_from_before_the_pooling_was_stored(model, tmp_path):
    save(model, tmp_path)
    options = json.loads((tmp_path / "config.json").read_text())
    del options["global_pool"]
    (tmp_path / "config.json").write_text(json.dumps(options))
    assert equal(load(tmp_path), model.eval())


def test_how_a_model_runs_is_not_stored_and_not_refused(model, tmp_path):
    model.backend = "naive"
    model.set_grad_checkpointing()
    model.default_cfg = {"by": "timm"}
    model.eval()
    save(model, tmp_path)
    assert equal(load(tmp_path), model)


def exchange(name, value):
    """In place, an attribute of a model's part."""
    part, _, attribute = name.rpartition(".")
    return lambda model: setattr(model.get_submodule(part), attribute, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (exchange("mixer.norm_o.eps", 4e-6), r"mixer\.norm_o\.eps \(4e-06 for 1e-06\)"),
        (exchange("mixer.dwconv.padding_mode", "circular"), r"mixer\.dwconv\.padding_mode \(circular for zeros\)"),
        (exchange("mixer.silu", None), r"mixer\.silu \(None for (True|False)\)"),
        (exchange("drop_path.p", 0.5), r"drop_path\.p \(0\.5 for 0\.0\)"),
        (exchange("drop_path", nn.Identity()), r"drop_path \(Identity for DropPath\)"),
        (exchange("after", nn.Dropout(0.1)), r"after; store its"),
    ],
    ids=["eps", "padding", "silu", "p", "part", "another part"],
)
def test_a_part_that_was_changed_is_refused(model, change, message, tmp_path):
    """Each has the same weights by the same names."""
    change(model.all_blocks()[-1])
    message = r"model: expected the parts of a (Hierarchical)?ViG of this config as they are made, got .*" + message
    with pytest.raises(ValueError, match=message):
        save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("activation", [torch.tanh, nn.Tanh()], ids=["function", "module"])
def test_another_activation_is_refused(model, activation, tmp_path):
    model.patch_embed.activation = activation
    with pytest.raises(ValueError, match=r"`load` would lose: patch_embed\.activation.*; store its state_dict\(\)"):
        save(model, tmp_path)


def test_the_released_inference_path_is_refused(tmp_path):
    torch.manual_seed(0)
    ours = create_model("vig_tiny", num_classes=3, img_size=32)
    names = released_names(ours)
    model = load_released({names[n]: x for n, x in ours.state_dict().items()}, released_inference=True)
    with pytest.raises(ValueError, match=r"blocks\.11\.mixer\.norm_o\.eps \(4e-06 for 1e-06\)"):
        save(model, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON as `save` writes it, got what is none"),
        ("\udcff", "expected JSON as `save` writes it, got what is none"),
        ("[1]", "expected an object as `save` writes it, got list"),
        ('{"family": {}, "config": {}}', "expected a family among .* and its config, got {}"),
        ('{"family": "ViG", "config": 3}', "expected a family among .* and its config, got 'ViG'"),
        ('{"family": "ViG", "config": {"dim": 16}}', "expected the options of a ViG as `save` writes them; .*num_h"),
        ('{"family": "ViG", "config": {"dim": 15, "num_heads": 2}}', "expected the options of a ViG .*; dim: expected"),
        ('{"family": "ViG", "config": {"dim": 16, "num_heads": 2}, "mlp": 1}', "expected the options .*; .*'mlp'"),
        ('{"family": "ViG", "config": {"dim": 16, "num_heads": 2}, "backend": "naive"}', "expected the .*'backend'"),
        ('{"family": "ViG", "config": {"dim": 16, "num_heads": 2}, "global_pool": "max"}', "expected .*global_pool: "),
    ],
)
def test_a_config_that_is_none(model, text, message, tmp_path):
    save(model, tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json: {message}"):
        load(tmp_path)


def test_damaged_weights(model, tmp_path):
    save(model, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{weights}: expected a safetensors file, got a damaged one or another"):
        load(tmp_path)


def test_a_file_for_a_folder(model, tmp_path):
    save(model, tmp_path)
    weights = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match=f"{weights}: expected a folder with config.json and .*, got a file"):
        load(weights)


def test_another_family_is_refused(model, tmp_path):
    save(model, tmp_path)
    options = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(options | {"family": "ViT"}))
    with pytest.raises(ValueError, match=r"config.json: expected a family among \('ViG', .*, got 'ViT'"):
        load(tmp_path)


def test_other_weights_are_refused(model, tmp_path):
    save(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["head.bias"] = torch.zeros(4)
    state["extra"] = state.pop("norm.weight")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing, unknown or misshapen: extra, head\.bias, norm\.weight$"):
        load(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path)


def test_hub_round_trip_in_a_folder(model, tmp_path):
    hub = pytest.importorskip("vig_ref.hub", reason="needs the extra 'hub'", exc_type=ImportError)
    hub.HubModel(model).save_pretrained(tmp_path)
    assert "library_name: vig_ref" in (tmp_path / "README.md").read_text()
    loaded = hub.HubModel.from_pretrained(tmp_path, backend="chunked").model
    assert loaded.backend == "chunked"
    assert equal(loaded, model.eval())


def test_push_and_pull(model, tmp_path, monkeypatch):
    """Against a hub that is a folder: what would be uploaded is what is downloaded."""
    hub = pytest.importorskip("vig_ref.hub", reason="needs the extra 'hub'", exc_type=ImportError)
    import shutil
    import types

    from huggingface_hub import hub_mixin

    def upload_folder(*, repo_id, folder_path, **_):
        shutil.copytree(folder_path, tmp_path / repo_id)

    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            return types.SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, **options):
            return upload_folder(**options)

    def download(repo_id, *, allow_patterns, revision, **_):
        assert revision == "v1"
        assert set(allow_patterns) == {"config.json", "model.safetensors"}
        return tmp_path / repo_id

    monkeypatch.setattr(hub_mixin, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.setattr(hub_mixin, "hf_hub_download", lambda repo_id, filename, **_: tmp_path / repo_id / filename)
    hub.HubModel(model).push_to_hub("me/my_vig")
    assert equal(hub.HubModel.from_pretrained("me/my_vig", revision="v1").model, model.eval())
