"""What is known of tables: different ids, skew, and what falls into which range of rows."""
from __future__ import annotations

import numpy as np
import pytest
from tablewright.rewriter.planner.facts import TableFacts, even, expected_unique, fitted_alpha, with_ids, with_law

ROWS, DRAWS = 30_000, 8_000


def zipf(alpha: float, draws: int) -> np.ndarray:
    p = np.arange(1, ROWS + 1) ** -alpha
    return np.random.default_rng(0).choice(ROWS, size=draws, p=p / p.sum())


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.1, 2.0])
def test_the_law_is_the_sum_over_all_rows(alpha):
    for draws in (100, DRAWS, 10 * DRAWS):
        p = np.arange(1, ROWS + 1) ** -alpha
        exactly = (1 - (1 - p / p.sum()) ** draws).sum()
        assert expected_unique(ROWS, draws, alpha) == pytest.approx(exactly, rel=0.005)


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.1])
def test_one_batch_tells_how_many_different_ids_many_hold(alpha):
    facts = with_ids("t", ROWS, 8, [zipf(alpha, DRAWS)], DRAWS)
    assert facts.unique_in(1) == len(np.unique(zipf(alpha, DRAWS)))
    assert facts.unique_in(16) == pytest.approx(len(np.unique(zipf(alpha, 16 * DRAWS))), rel=0.05)


def test_fitted_alpha_is_uniform_for_a_permutation_and_large_for_one_id():
    assert fitted_alpha(1000, 1000, 1000) == 0.0
    assert fitted_alpha(1000, 1000, 1) > 3.9


def test_shares_follow_the_sample_over_the_ranges_that_sharding_cuts():
    assert even(10, 4).tolist() == [3, 3, 2, 2]
    ids = np.array([0, 0, 0, 2, 3, 9])
    facts = with_ids("t", 10, 4, [ids], 6)
    rows, seen, different = facts.ranges(4)
    assert rows.tolist() == [3, 3, 2, 2]
    assert seen.tolist() == pytest.approx([4 / 6, 1 / 6, 0, 1 / 6])
    assert different.tolist() == pytest.approx([2 / 4, 1 / 4, 0, 1 / 4])
    uniform = with_law("t", 10, 4, 6, 6)
    assert uniform.ranges(4)[1].tolist() == pytest.approx([0.3, 0.3, 0.2, 0.2])


def test_ids_that_are_not_read_do_not_count():
    facts = with_ids("t", 10, 4, [np.array([1, 1, 5]), np.array([[-1, 5]])], 3, padding=5)
    assert facts.ids == 3 and facts.unique == 2 and facts.sample[0].tolist() == [1, 9]
    assert with_ids("t", 10, 4, [], 0).ids == 0


def test_bytes_with_optimizer_state():
    assert TableFacts("t", 10, 4, 0, 0, 0, row_state=4).bytes == 10 * (4 * 4 + 4)
    assert TableFacts("t", 10, 4, 0, 0, 0, state=8, itemsize=2).bytes == 10 * 4 * 10


def test_nothing_is_nothing():
    assert expected_unique(0, 10, 1.0) == 0 and expected_unique(10, 0, 1.0) == 0
    assert expected_unique(1, 10, 1.0) == pytest.approx(1)
