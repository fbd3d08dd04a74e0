"""Where a plan puts tables: what its words may be, and what goes together."""
from __future__ import annotations

import pytest
import tablewright as tw
from small_models import Dot, dot_batch


def plan(**entry):
    return tw.Plan.from_dict({"version": 1, "tables": {"user*": entry}})


def test_entries_merge_key_by_key():
    made = tw.Plan.from_dict({"version": 1, "tables": {
        "user*": {"sharding": "row_wise", "communication": {"forward": "fp16"}},
        "*": {"sharding": "table_wise", "ranks": [1], "exchange": "unique"},
    }})  # fmt: skip
    found = made.resolve(["user.weight", "item.weight"])
    assert found["item.weight"] == tw.TablePlan(sharding="table_wise", ranks=(1,), exchange="unique")
    user = found["user.weight"]
    assert (user.sharding, user.ranks, user.exchange) == ("row_wise", (1,), "unique")
    assert user.communication == tw.Communication(forward="fp16", backward="fp32")


@pytest.mark.parametrize("entry, said", [
    ({"sharding": "row_wize"}, r"tables.user\*.sharding is 'row_wize' \(did you mean 'row_wise'\?\); it must be data_parallel"),
    ({"exchange": "uniq"}, r"tables.user\*.exchange is 'uniq' \(did you mean 'unique'"),
    ({"ranks": []}, "a list of different rank numbers"),
    ({"ranks": [0, 0]}, "a list of different rank numbers"),
    ({"ranks": [-1]}, "a list of different rank numbers"),
    ({"ranks": [True]}, "a list of different rank numbers"),
    ({"ranks": 1}, "a list of different rank numbers"),
    ({"communication": "fp16"}, r"communication is 'fp16'; it must be a mapping"),
    ({"communication": {"forwards": "fp16"}}, "no key 'forwards' .did you mean 'forward'"),
    ({"communication": {"forward": "fp61"}}, r"tables.user\*.communication.forward is 'fp61' .did you mean 'fp16'"),
])  # fmt: skip
def test_bad_words_are_named(entry, said):
    with pytest.raises(tw.PlanError, match=said):
        plan(**entry)


def test_ranks_that_do_not_go_with_the_sharding():
    with pytest.raises(tw.PlanError, match="'user.weight' is table_wise on ranks .0, 1.; a whole table is on one rank"):
        plan(sharding="table_wise", ranks=[0, 1]).resolve(["user.weight"])
    for sharding in (None, "data_parallel"):
        with pytest.raises(tw.PlanError, match="ranks go with another sharding"):
            plan(sharding=sharding, ranks=[0]).resolve(["user.weight"])


def test_a_plan_for_several_ranks_does_not_run_on_one_unnoticed():
    with pytest.raises(tw.PlanError, match="mesh"):
        tw.optimize(Dot(), plan(sharding="row_wise"), sample_inputs=dot_batch())
