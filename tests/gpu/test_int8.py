"""int8 on a CUDA device: coding and decoding give numpy's numbers there too."""

import numpy as np
import pytest
import torch

from pipeline.encode.tokens import TokenStorage
from shards.values.quantize import fit_code
from train.models.dequantize import Dequantizer, latents_of
from train.models.normalizer import LatentNormalizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def tokens():
    """float32 [4, 16, 96] with channels of very different size."""
    scale = 10.0 ** np.linspace(-1, 0.5, 96)
    return (np.random.default_rng(0).standard_normal((4, 16, 96)) * scale + scale).astype(np.float32)


@pytest.fixture(scope="module")
def code(tokens):
    """A code fitted to them."""
    return fit_code(tokens.reshape(-1, 96))


def test_the_device_codes_as_numpy_does(tokens, code):
    stored = TokenStorage("int8", code)(torch.from_numpy(tokens).cuda())
    codes = code.encode(tokens)
    np.testing.assert_array_equal(stored.values.cpu().numpy(), codes)
    error = np.square(code.decode(codes).astype(np.float64) - tokens).sum(1)
    np.testing.assert_allclose(stored.square_error.cpu().numpy(), error, rtol=1e-5)


def test_the_device_decodes_bit_for_bit_and_normalises_in_the_same_pass(tokens, code):
    codes = code.encode(tokens)
    stored = Dequantizer(torch.from_numpy(code.table)).cuda()
    decoded = torch.from_numpy(code.decode(codes))
    assert torch.equal(stored(torch.from_numpy(codes).cuda()).cpu(), decoded)
    assert torch.equal(torch.compile(stored)(torch.from_numpy(codes).cuda()).cpu(), decoded)
    normalizer = LatentNormalizer(torch.randn(96, 4, 4), torch.rand(96, 4, 4) + 0.1)
    expected = normalizer.to_latents(decoded)
    latents = latents_of(stored, normalizer.cuda())
    for count in (4, 3):
        torch.testing.assert_close(
            latents(torch.from_numpy(codes[:count]).cuda()).cpu(), expected[:count], rtol=1e-6, atol=1e-6
        )
