"""The model and its training on a GPU, where the fused layer is compiled. The operator's tests run there unchanged."""

import pytest
import torch

from vig_ref import ViG, ViGConfig, bidirectional_gla, create_model, resolve_backend
from vig_ref.fused import launch
from vig_ref.model import PatchConv
from vig_ref.tolerance import draw

pytestmark = pytest.mark.gpu
CONFIG = ViGConfig(dim=64, num_heads=2, depth=2, silu=True)


def model_and_images(seed=0):
    """A small model whose weights are of ordinary size, and images of 4 x 6 patches."""
    torch.manual_seed(seed)
    model = ViG(CONFIG, num_classes=5, img_size=64)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return model.cuda(), torch.randn(2, 3, 64, 96, device="cuda")


def test_auto_is_fused():
    assert resolve_backend("auto", "cuda") == "fused"


def test_fused_model_equals_the_naive_one_in_float64():
    """Float32 rounds by 6e-8 an operation; a block passes some hundred of them one after another."""
    model, images = model_and_images()
    with torch.backends.cudnn.flags(allow_tf32=False):  # PyTorch lets convolutions use tf32 unless told otherwise
        logits = model(images)
        logits.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    oracle = model.double()
    oracle.backend = "naive"
    oracle.zero_grad()
    expected = oracle(images.double())
    expected.square().sum().backward()
    assert (logits - expected).norm() <= 1e-5 * expected.norm()
    for name, p in oracle.named_parameters():
        assert (grads[name] - p.grad).norm() <= 1e-4 * p.grad.norm(), name


def test_the_first_convolution_equals_that_of_the_cpu():
    """Sums of 243 products in float64, in another order."""
    conv = PatchConv(3, 8, 9, 8).double()
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    torch.testing.assert_close(conv(x).cuda(), conv.cuda()(x.cuda()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_forward_inside_backward_outside(dtype):
    model, images = model_and_images()
    expected = model(images).detach()
    with torch.autocast("cuda", dtype):
        logits = model(images)
    logits.float().square().sum().backward()
    assert (logits - expected).norm() <= 0.05 * expected.norm()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_compiled_model_is_one_graph_at_any_size():
    model, images = model_and_images()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for x in (images, images[:, :, :48, :80], images[:1]):
        expected = model(x)
        assert (compiled(x) - expected).norm() <= 1e-4 * expected.norm()


def test_a_graph_can_be_captured_and_replayed():
    model, images = model_and_images()
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            model(images)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(images)
        images.copy_(torch.randn_like(images))
        graph.replay()
        assert torch.equal(logits, model(images))


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("many", [1, 10**9], ids=["halves", "segments"])
def test_launches_that_overlap_can_be_captured(many, copied, monkeypatch):
    """Up to four kernels a pass, of which each may be launched before the one ahead of it has ended. The first has none
    ahead, or a copy, which is no kernel."""
    monkeypatch.setattr(launch, "MANY", many)
    x = draw(2, 3, 3 * launch.SEGMENT + 5, 32, 64, regime="vig", dtype=torch.bfloat16, device="cuda")
    leaves = [t.detach().requires_grad_() for t in x[:5]]

    def step(leaves):
        q, *others = leaves
        o = bidirectional_gla(q.clone() if copied else q, *others, backend="fused")
        return o, *torch.autograd.grad(o, leaves, x.do)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(leaves)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(leaves)
    with torch.no_grad():
        leaves[0].copy_(leaves[1])
    graph.replay()
    # New leaves: the captured result keeps autograd's nodes of the others, which belong to the graph's stream.
    eager = step([t.detach().requires_grad_() for t in leaves])
    assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))


def test_vig_tiny_takes_a_training_step():
    torch.manual_seed(0)
    model = create_model("vig_tiny", num_classes=10).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images, labels = torch.randn(8, 3, 224, 224, device="cuda"), torch.arange(8, device="cuda")
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
