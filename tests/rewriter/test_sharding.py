"""Sharded training equals plain training, number by number, over real processes.

All pairs of settings run here; the full product by hand: ``python tests/rewriter/test_sharding.py`` (about half an hour).
"""
from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1])]

from ranks import Pools
from sharding_cases import AXES, NODE_AXES, Case, agree, pairs, train, train_alike, train_and_copy


@pytest.fixture(scope="module")
def pools():
    made = Pools()
    yield made
    made.close()


# Three settings that meet in no pair: squares of cut rows are summed over ranks inside the backward, from gradients that lie nowhere.
IN_TWO_PASSES = Case("column_wise", "pooled", "rowwise_adagrad", "in_backward", "uneven", 3)


@pytest.mark.parametrize("case", sorted([*(Case(**c) for c in pairs(AXES)), IN_TWO_PASSES], key=lambda c: c.world), ids=str)
def test_training_equals_the_plain_model(pools, case):
    agree(pools(case.world).run(train, case))


@pytest.mark.parametrize("mode", ["step", "in_backward"])
def test_columns_that_one_rank_has_none_of(pools, mode):
    """Its gradient without rows is no part of the sums of squares over ranks."""
    tables = json.dumps({"user": {"sharding": "column_wise", "ranks": [0, 2]}, "*": {"sharding": "table_wise"}})
    agree(pools(3).run(train, Case("", "", "rowwise_adagrad", mode, "empty", 3, tables=tables)))


@pytest.mark.parametrize(("sharding", "world"), [("table_wise", 2), ("column_wise", 3)])
def test_answers_that_travel_side_by_side(pools, sharding, world):
    pools(world).run(train_alike, sharding)


@pytest.mark.parametrize(("sharding", "exchange"), [("row_wise", "unique"), ("column_wise", "pooled")])
def test_what_two_ranks_send_themselves_they_copy(pools, sharding, exchange):
    agree(pools(2).run(train_and_copy, Case(sharding, exchange, "rowwise_adagrad", "in_backward", "empty", 2)))


def main() -> None:
    made, wrong = Pools(), []
    cases = [Case(**dict(zip(AXES, values))) for values in itertools.product(*AXES.values())]
    cases += [Case(**dict(zip(NODE_AXES, values)), exchange="pooled", world=4) for values in itertools.product(*NODE_AXES.values())]
    random.Random(0).shuffle(cases)  # so that a run that is cut short has seen some of everything
    for number, case in enumerate(cases):
        try:
            agree(made(case.world).run(train, case))
        except AssertionError as error:
            wrong.append(case)
            print(f"{case}: {str(error)[-600:]}")
        if number % 50 == 0:
            print(f"{number} of {len(cases)}, {len(wrong)} wrong", flush=True)
    made.close()
    print(f"{len(cases)} cases, {len(wrong)} wrong: {', '.join(map(str, wrong))}")


if __name__ == "__main__":
    main()
