"""Key smoothing and the Hadamard rotation."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch

from dma_hf.transforms import hadamard_matrix, hadamard_size, key_mean, rotate

HEAD_DIMS = [64, 80, 96, 128, 192]


@pytest.mark.parametrize("size", [1, 2, 16, 32, 64, 128])
def test_hadamard_matrix_is_orthonormal_and_symmetric(size):
    matrix = hadamard_matrix(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size), atol=1e-6, rtol=0)
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix.double(), torch.from_numpy(oracles.hadamard(size)), atol=1e-7, rtol=0)


@pytest.mark.parametrize(("head_dim", "size"), [(64, 64), (80, 16), (96, 32), (128, 128), (192, 64), (1, 1)])
def test_hadamard_size_is_the_largest_power_of_two_that_divides(head_dim, size):
    assert hadamard_size(head_dim) == size


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotation_is_orthonormal_and_its_own_inverse(head_dim):
    matrix = rotate(torch.eye(head_dim))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(head_dim), atol=1e-6, rtol=0)
    x = torch.randn(3, 5, head_dim, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotate(rotate(x)), x, atol=1e-5, rtol=0)
    np.testing.assert_allclose(rotate(x).numpy(), oracles.rotate(x.numpy()), atol=1e-5)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotation_leaves_scores_alone_and_spreads_an_outlier(head_dim):
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(7, head_dim, generator=g), torch.randn(9, head_dim, generator=g)
    torch.testing.assert_close(rotate(q) @ rotate(k).T, q @ k.T, atol=1e-4, rtol=0)
    outlier = torch.zeros(head_dim)
    outlier[3] = 1.0
    assert rotate(outlier).abs().max().item() == pytest.approx(hadamard_size(head_dim) ** -0.5)


def test_softmax_does_not_see_key_smoothing():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 7, 64, generator=g), torch.randn(2, 33, 64, generator=g) + 5.0
    smoothed = k - key_mean(k)
    expected = torch.softmax(q @ k.mT, -1)
    torch.testing.assert_close(torch.softmax(q @ smoothed.mT, -1), expected, atol=1e-5, rtol=0)
    assert smoothed.mean(-2).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_key_mean_is_over_tokens_per_head_and_channel_in_float32(dtype):
    k = torch.randn(2, 3, 50, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    mean = key_mean(k)
    assert mean.shape == (2, 3, 1, 16)
    assert mean.dtype == torch.float32
    np.testing.assert_allclose(mean.numpy(), k.double().numpy().mean(2, keepdims=True), atol=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_nan_or_inf_enters_the_key_mean_as_zero(bad):
    k = torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(0))
    k[0, 4, 2] = bad
    mean = key_mean(k)
    assert mean.isfinite().all()
    as_zero = k.clone()
    as_zero[0, 4, 2] = 0.0
    assert torch.equal(mean, key_mean(as_zero))
