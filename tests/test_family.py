"""All six models, whole: every layer gives the same logits, on a square and on an oblong image."""

import pytest
import torch

from vig_ref.model import PRESETS, create_model, wake

#: Layers round differently, 2^-24 an operation, in up to 17 + 6 blocks: measured, at most 2e-6 of the largest logit.
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=PRESETS)
def model(request):
    torch.manual_seed(0)
    model = create_model(request.param).eval()
    wake(model)
    return model


@torch.no_grad()
@pytest.mark.parametrize("size", [(224, 224), (160, 256)])
def test_naive_and_chunked_agree(model, size):
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    model.backend = "naive"
    expected = model(x)
    model.backend = "chunked"
    assert (model(x) - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(224, 224), (160, 256)])
@pytest.mark.parametrize("name", PRESETS)
def test_fused_agrees_on_a_gpu(name, size):
    torch.manual_seed(0)
    model, x = create_model(name, backend="chunked").eval().cuda().double(), torch.randn(1, 3, *size).cuda()
    wake(model)
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):  # convolutions in float32, as on the CPU
        expected = model(x.double())
        model.float().backend = "fused"
        assert (model(x) - expected).abs().max() <= TOLERANCE * expected.abs().max()
