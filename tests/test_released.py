"""Released weights: the authors' own outputs, every form a checkpoint comes in, and what is refused."""

import ast
import math
import pickle
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vig_ref.model import PRESETS, Mixer, create_model
from vig_ref.released import load_released, released_names

BACKENDS = ("naive", "chunked")
GOLDEN = Path(__file__).parent / "golden" / "released_vig_t.npz"


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN)


@pytest.fixture(scope="module")
def weights(golden):
    return released_weights(golden["names"], golden["shapes"])


@pytest.fixture(scope="module")
def models(weights):
    """The model under both readings of the released code: False as it trains, True as it infers."""
    return {inference: load_released(weights, released_inference=inference) for inference in (False, True)}


def released_weights(names, shapes):
    """Each tensor drawn from its name; see golden/README.md."""
    state = {}
    for name, shape in zip(map(str, names), map(ast.literal_eval, map(str, shapes)), strict=True):
        x = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(shape)
        if len(shape) == 1:
            x = 1 + 0.1 * x if name.endswith("weight") else 0.1 * x
        elif name == "pos_embed":
            x = 0.02 * x
        else:
            x = x / math.sqrt(math.prod(shape[1:]))
        state[name] = torch.from_numpy(x)
    return state


def images(height, width):
    r = np.random.RandomState(20240528)
    return torch.from_numpy(r.standard_normal((2, 3, height, width)))


@pytest.mark.parametrize(("height", "width", "tolerance"), [(224, 224, 1e-8), (160, 256, 1e-5)])
@pytest.mark.parametrize("inference", [False, True], ids=["train", "eval"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_logits(golden, models, backend, inference, height, width, tolerance):
    model = models[inference]
    model.backend = backend
    with torch.no_grad():
        logits = model(images(height, width))
    expected = golden[f"logits_{'eval' if inference else 'train'}_{height}x{width}"]
    assert np.abs(logits.numpy() - expected).max() <= tolerance


def test_golden_tolerance_sees_one_percent(golden):
    for key in golden.files[2:]:
        assert 0.01 * np.abs(golden[key]).max() > 100 * 1e-5


def test_names_and_shapes_are_the_released_ones(golden):
    with torch.device("meta"):
        model = create_model("vig_tiny")
    names = released_names(model)
    ours = {names[name]: str(tuple(x.shape)) for name, x in model.state_dict().items()}
    assert ours == dict(zip(golden["names"].tolist(), golden["shapes"].tolist(), strict=True))


def test_the_result_is_ready_to_use(weights):
    model = load_released(weights, backend="naive")
    assert not model.training
    assert model.backend == "naive"
    assert all(p.requires_grad and p.dtype == torch.float64 for p in model.parameters())


def test_released_inference_changes_one_eps(models):
    for inference, model in models.items():
        mixers = [m for m in model.modules() if isinstance(m, Mixer)]
        assert {m.norm_o.eps for m in mixers} == {4e-6 if inference else 1e-6}
        assert {m.norm_local.eps for m in mixers} == {1e-6}


def test_the_model_shares_no_memory_with_its_source(weights):
    source = dict(weights, **{"head.bias": weights["head.bias"].clone()})
    model = load_released(source)
    source["head.bias"].zero_()
    assert torch.equal(model.head.bias, weights["head.bias"])


@pytest.mark.parametrize("name", PRESETS)
def test_the_variant_is_found_from_the_shapes(name):
    with torch.device("meta"):
        model = create_model(name)
    names = released_names(model)
    loaded = load_released({names[key]: x for key, x in model.state_dict().items()})
    assert loaded.config == PRESETS[name]


def test_other_sizes_are_found_from_the_shapes(weights):
    changed = {
        "head.weight": torch.randn(10, 192), "head.bias": torch.randn(10), "pos_embed": torch.randn(1, 64, 192),
        "patch_embed.proj.0.weight": torch.randn(96, 1, 9, 9),
    }
    model = load_released({**weights, **changed})
    assert model.grid == (8, 8)
    assert model(torch.zeros(1, 1, 32, 32, dtype=torch.float64)).shape == (1, 10)
    assert torch.equal(model.pos_embed, changed["pos_embed"].double())


@pytest.mark.parametrize(
    ("given", "result"),
    [("float64", "float64"), ("float32", "float32"), ("float16", "float32"), ("bfloat16", "float32")],
)
def test_dtype(weights, given, result):
    model = load_released({name: x.to(getattr(torch, given)) for name, x in weights.items()})
    assert {p.dtype for p in model.parameters()} == {getattr(torch, result)}
    assert torch.equal(model.head.bias, weights["head.bias"].to(getattr(torch, given)).to(getattr(torch, result)))


@pytest.mark.parametrize("wrap", ["bare", "model", "model_ema", "both", "no ema"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_where_the_weights_stand(weights, wrap, prefix):
    state = {prefix + name: x for name, x in weights.items()}
    other = {name: torch.zeros_like(x) for name, x in state.items()}
    source = {
        "bare": state,
        "model": {"model": state, "epoch": 299},
        "model_ema": {"model_ema": state, "optimizer": {"state": {}}},
        "both": {"model": other, "model_ema": state},
        "no ema": {"model": state, "model_ema": None},
    }[wrap]
    assert torch.equal(load_released(source).head.bias, weights["head.bias"])


def test_files(weights, tmp_path):
    state = {name: x.float() for name, x in weights.items()}
    torch.save({"model": state, "epoch": 299}, tmp_path / "vig_t.pth")
    save_file(state, tmp_path / "vig_t.safetensors")
    for path in (tmp_path / "vig_t.pth", str(tmp_path / "vig_t.pth"), tmp_path / "vig_t.safetensors"):
        loaded = load_released(path)
        names = released_names(loaded)
        assert all(torch.equal(x, state[names[name]]) for name, x in loaded.state_dict().items())


def test_a_training_file_with_optimizer_and_settings(weights, tmp_path, monkeypatch):
    """What the authors' training writes: settings are an object of `yacs`, which nobody needs to have installed."""
    yacs = types.ModuleType("yacs.config")
    yacs.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    settings = yacs.CfgNode(MODEL=yacs.CfgNode(NAME="vig_tiny"), TAGS=["a", 1.5])
    settings.__dict__["__immutable__"] = True
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    checkpoint = {
        "model": {f"module.{name}": torch.zeros_like(x).half() for name, x in weights.items()},
        "model_ema": {f"module.{name}": x.half() for name, x in weights.items()},
        "optimizer": optimizer.state_dict(), "lr_scheduler": {"base_values": [1e-3]}, "scaler": {}, "epoch": 299,
        "max_accuracy": 77.2, "config": settings,
    }  # fmt: skip
    with monkeypatch.context() as with_yacs:
        with_yacs.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        with_yacs.setitem(sys.modules, "yacs.config", yacs)
        torch.save(checkpoint, tmp_path / "ckpt.pth")
    loaded = load_released(tmp_path / "ckpt.pth")
    assert torch.equal(loaded.head.bias, weights["head.bias"].half().float())
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_all_misfits_are_listed(weights):
    source = {name: x for name, x in weights.items() if name != "norm.weight"}
    source["blocks.12.attn.o_proj.weight"] = torch.zeros(192, 192)
    source["pos_embed"] = torch.zeros(1, 197, 192)
    source["head.bias"] = torch.zeros(10)
    source["blocks.0.attn.g_norm.weight"] = [1.0] * 64
    source["blocks.0.attn.l_norm.weight"] = torch.ones(64, dtype=torch.int64)
    source["blocks.1.attn.l_norm.weight"] = torch.ones(64).to_sparse()
    with pytest.raises(ValueError, match="not a released ViG: 7 entries do not fit") as error:
        load_released(source)
    assert set(str(error.value).split("\n  ")[1:]) == {
        "norm.weight: missing, expected [192]",
        "blocks.12.attn.o_proj.weight: unknown",
        "pos_embed: expected [1, 196, 192], got [1, 197, 192]",
        "head.bias: expected [1000], got [10]",
        "blocks.0.attn.g_norm.weight: expected a tensor, got list",
        "blocks.0.attn.l_norm.weight: "
        "expected dense float64, float32, float16 or bfloat16, got torch.strided torch.int64",
        "blocks.1.attn.l_norm.weight: "
        "expected dense float64, float32, float16 or bfloat16, got torch.sparse_coo torch.float32",
    }


def test_an_unknown_backend_is_refused(weights):
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        load_released(weights, backend="fast")


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("write", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))], ids=["zip", "bare"])
def test_a_hostile_file_is_refused_and_not_executed(tmp_path, weights, write):
    proof, path = tmp_path / "executed", tmp_path / "vig_t.pth"
    write({"model": {"head.bias": weights["head.bias"]}, "config": Hostile(proof)}, path)
    with pytest.raises(ValueError, match="is not a plain tensor checkpoint and was not unpickled; where you trust"):
        load_released(path)
    assert not proof.exists()
    pickle.loads(pickle.dumps(Hostile(proof)))
    assert proof.exists()  # so the file would have done it


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 broken"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_damaged_file_is_refused(tmp_path, content, suffix):
    path = tmp_path / f"vig_t{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a plain tensor checkpoint"):
        load_released(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_missing_file_is_missing(tmp_path, suffix):
    with pytest.raises(FileNotFoundError):
        load_released(tmp_path / f"none{suffix}")


def test_other_sources_are_refused(tmp_path):
    with pytest.raises(TypeError, match="source: expected a state dict or a file that holds one, got int"):
        load_released(3)
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(TypeError, match="source: expected a state dict or a file that holds one, got list"):
        load_released(tmp_path / "list.pth")
