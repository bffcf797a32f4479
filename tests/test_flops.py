"""The counter: the operator by its definition, whichever layer computes it, and nothing left out."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vig_ref.flops
from test_model import TINY
from vig_ref import BACKENDS, bidirectional_gla, gla, naive
from vig_ref.flops import count_macs
from vig_ref.model import ViG, create_model

B, H, T, K, V = 2, 3, 20, 4, 6


def inputs(device="cpu"):
    torch.manual_seed(0)
    q, k, g_fwd, g_rev = (torch.randn(B, H, T, K, device=device) for _ in range(4))
    v = torch.randn(B, H, T, V, device=device)
    return [x.requires_grad_() for x in (q, k, v, -g_fwd.detach().abs(), -g_rev.detach().abs())]


def flops(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("backend", BACKENDS)
def test_on_meta_every_layer_costs_what_the_definition_says(backend):
    q, k, v, g_fwd, g_rev = inputs("meta")
    forward = 2 * B * H * T * 2 * K * V
    assert flops(lambda: gla(q, k, v, g_fwd, backend=backend)) == forward
    assert flops(lambda: bidirectional_gla(q, k, v, g_fwd, g_rev, backend=backend)) == 2 * forward
    o = bidirectional_gla(q, k, v, g_fwd, g_rev, backend=backend)
    assert (o.shape, o.dtype, o.device) == (v.shape, v.dtype, v.device)
    assert flops(lambda: o.sum().backward()) == 4 * forward
    assert all(x.grad.shape == x.shape for x in (q, k, v, g_fwd, g_rev))


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled for CUDA tensors here")
def test_the_fused_kernels_cost_the_same():
    x = inputs()
    forward = 2 * B * H * T * 2 * K * V
    results = []
    assert flops(lambda: results.append(bidirectional_gla(*x, backend="fused"))) == 2 * forward
    assert flops(lambda: results[0].sum().backward()) == 4 * forward
    assert flops(lambda: gla(*x[:4], backend="fused")) == forward


def test_what_the_recurrence_multiplies():
    """PyTorch counts q S, half of the definition; k^T v is elementwise there. So the formula is twice what it sees."""
    q, k, v, g_fwd, g_rev = inputs()
    seen = flops(lambda: naive.bidirectional_gla(q, k, v, g_fwd, g_rev, scale=1.0))
    assert 2 * seen == vig_ref.flops.operator_flops(q.shape, v.shape, 2)


def by_hand(D, H, depth, T, hidden, classes, p):
    """The plain ViG, term by term."""
    stem = 4 * T * (p // 2 + 1) ** 2 * 3 * D // 2 + T * 9 * D // 2 * D
    mixer = 9 * D + 2 * D * D + 16 * D + 16 * D + D * D + D * D + 2 * D * D // H
    return stem + depth * T * (mixer + 3 * D * hidden) + D * classes


@pytest.mark.parametrize(
    ("name", "hidden", "size"), [("vig_tiny", 512, 224), ("vig_small", 1024, 224), ("vig_base", 2048, (160, 256))]
)
def test_plain_models_by_hand(name, hidden, size):
    with torch.device("meta"):
        model = create_model(name)
    height, width = size if isinstance(size, tuple) else (size, size)
    c = model.config
    expected = by_hand(c.dim, c.num_heads, c.depth, height * width // 256, hidden, 1000, 16)
    assert count_macs(model, size)[""] == expected


@pytest.mark.parametrize(("name", "paper"), [("vig_h_tiny", 4.5), ("vig_h_small", 8.8), ("vig_h_base", 15.5)])
def test_hierarchical_models_have_the_papers_flops(name, paper):
    with torch.device("meta"):
        assert count_macs(create_model(name))[""] / 1e9 == pytest.approx(paper, abs=0.06)


def test_parts_add_up_and_the_model_is_not_touched():
    model = ViG(TINY, num_classes=5, img_size=16, in_chans=1)
    macs = count_macs(model, 16, in_chans=1)
    assert macs[""] == macs["patch_embed"] + sum(macs[f"blocks.{n}"] for n in range(2)) + macs["head"]
    assert macs["blocks.0"] == macs["blocks.0.mixer"] + macs["blocks.0.mlp"]
    assert model.training
    assert model.head.weight.device.type == "cpu"


def test_a_model_runs_on_meta_at_sizes_that_no_memory_holds():
    with torch.device("meta"):
        model = create_model("vig_tiny", backend="naive")
        assert model(torch.empty(64, 3, 4096, 4096)).shape == (64, 1000)
