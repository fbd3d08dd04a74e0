"""Smaller tables fitted to one table: exact where the rows allow it, least squares where they do not."""
from __future__ import annotations

import pytest
import torch
from tablewright.kernels import compression as fits

ROWS, DIM, K = 103, 6, 10  # the last place of quotients is known in part


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_of(quotient, remainder, multiply, padding, rows=ROWS, k=K):
    """By the formula, one row at a time."""
    last = (-(-rows // k), k)
    made = []
    for i in range(rows):
        a, b = last if i == padding else (i // k, i % k)
        made.append(quotient[a] * remainder[b] if multiply else quotient[a] + remainder[b])
    return torch.stack(made)


@pytest.mark.parametrize("padding", [None, 0, 57, ROWS - 1])
@pytest.mark.parametrize("multiply", [True, False])
def test_products_and_sums_are_met_exactly(multiply, padding):
    a, b = drawn(11, DIM), drawn(K, DIM, seed=1)
    rows = rows_of(torch.cat([a, a[:1]]), torch.cat([b, b[:1]]), multiply, None)
    if padding is not None:
        rows[padding] = 7 + torch.arange(DIM)  # no such product or sum: it has a row of its own
    quotient, remainder = fits.fit_quotient_remainder(rows, K, multiply, padding)
    assert quotient.shape == (11 + (padding is not None), DIM) and remainder.shape == (K + (padding is not None), DIM)
    torch.testing.assert_close(rows_of(quotient, remainder, multiply, padding), rows, rtol=1e-5, atol=1e-5)
    if padding is not None:
        assert torch.equal(rows_of(quotient, remainder, multiply, padding)[padding], rows[padding])


@pytest.mark.parametrize("multiply", [True, False])
def test_other_rows_are_met_as_well_as_they_can_be(multiply):
    rows = drawn(ROWS, DIM).double()
    quotient, remainder = fits.fit_quotient_remainder(rows, K, multiply, None)
    found = (rows_of(quotient, remainder, multiply, None) - rows).square().sum()
    assert found < rows.square().sum()
    for seed in range(20):  # no small step makes it better
        step = 1e-3 * drawn(11, DIM, seed=seed).double(), 1e-3 * drawn(K, DIM, seed=seed + 50).double()
        other = (rows_of(quotient + step[0], remainder + step[1], multiply, None) - rows).square().sum()
        assert other > found - (1e-3 if multiply else 1e-9) * found  # products are met step by step, and not to the end


def test_a_product_of_zeros_can_be_trained():
    quotient, remainder = fits.fit_quotient_remainder(torch.zeros(ROWS, DIM), K, True, 3)
    assert torch.equal(quotient, torch.ones(12, DIM)) and not remainder.any()


@pytest.mark.parametrize("padding", [None, 4])
def test_hashed_rows_are_means(padding):
    rows = drawn(ROWS, DIM)
    hashed = fits.fit_hashed(rows, K, padding)
    for k in range(K):
        members = [i for i in range(ROWS) if i % K == k and i != padding]
        torch.testing.assert_close(hashed[k], rows[members].mean(0))
    assert hashed.shape[0] == K + (padding is not None) and (padding is None or torch.equal(hashed[K], rows[padding]))


def test_a_projection_is_the_best_of_its_rank():
    rows = drawn(ROWS, DIM).double()
    rows[9] = 0
    for narrow in (1, 3, DIM):
        base, projection = fits.fit_projected(rows, narrow, 9)
        u, s, v = torch.linalg.svd(rows, full_matrices=False)
        torch.testing.assert_close(base @ projection, u[:, :narrow] * s[:narrow] @ v[:narrow])
        torch.testing.assert_close(projection @ projection.t(), torch.eye(narrow, dtype=torch.float64))
        assert base.shape == (ROWS, narrow) and not base[9].any()


def decoded(codebooks, codes, parts, padding):
    width = codebooks.shape[1]
    books = codebooks.view(parts, 257, width)
    rows = torch.stack([torch.cat([books[p, int(c[p])] for p in range(parts)]) for c in codes])
    if padding is not None:
        rows[padding] = books[:, 256].flatten()
    return rows


def test_few_rows_are_quantized_exactly():
    rows = drawn(200, 8)
    codebooks, codes = fits.fit_quantized(rows, 4, 3)
    assert codes.dtype == torch.uint8 and codes.shape == (200, 4) and codebooks.shape == (4 * 257, 2)
    assert torch.equal(decoded(codebooks, codes, 4, 3), rows)


def test_many_rows_are_quantized_to_the_nearest_centroid():
    rows = drawn(3000, 8)
    before = torch.get_rng_state()
    codebooks, codes = fits.fit_quantized(rows, 2, 7)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(decoded(codebooks, codes, 2, 7)[7], rows[7])
    books = codebooks.view(2, 257, 4)
    for part in range(2):
        distances = torch.cdist(rows[:, part * 4 : part * 4 + 4].double(), books[part, :256].double())
        chosen = distances.gather(1, codes[:, part : part + 1].long()).squeeze(1)
        others = torch.arange(3000) != 7
        torch.testing.assert_close(chosen[others], distances.min(1).values[others], rtol=1e-3, atol=1e-3)
        assert codes[others, part].unique().numel() > 250, "nearly all centroids are used"
    error = (decoded(codebooks, codes, 2, 7) - rows).square().mean()
    draws = torch.cdist(rows[:, :4], rows[:256, :4]).min(1).values.square().mean() / 4
    assert error < 0.85 * draws, "better than rows that were drawn as centroids"


def test_equal_rows_need_one_centroid():
    rows = torch.ones(1000, 4)
    assert torch.equal(decoded(*fits.fit_quantized(rows, 2, None), 2, None), rows)
