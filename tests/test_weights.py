"""Models to and from folders and the Hub."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import test_hierarchical
import test_model
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
