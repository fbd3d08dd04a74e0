"""Compressed exchanges stay within their bounds; ``auto`` counts bytes; nothing travels that need not."""
from __future__ import annotations

import pytest
from ranks import Pools
from sharding_codecs import ROWS, chosen, counted, cut, errors, ids_of

EXACT = {"fp32"}


@pytest.fixture(scope="module")
def pools():
    made = Pools()
    yield made
    made.close()


@pytest.mark.parametrize(
    ("sharding", "exchange", "forward", "backward"),
    [
        ("row_wise", "pooled", "fp16", "bf16"), ("row_wise", "unique", "int8", "fp16"), ("column_wise", "pooled", "bf16", "int8"),
        ("table_wise", "unique", "int8", "int8"), ("table_wise", "pooled", "fp32", "int8"), ("column_wise", "unique", "fp16", "fp32"),
    ],
)  # fmt: skip
def test_errors_stay_within_the_codecs_bounds(pools, sharding, exchange, forward, backward):
    ranks = pools(2).run(errors, sharding, exchange, forward, backward)
    for found in ranks:
        assert found["out"] <= 1 and found["moved"] <= 1, found
        assert found["zero rows"] == 0
    assert any(f["out differs"] for f in ranks) == (forward not in EXACT)
    assert any(f["bag differs"] or f["row differs"] for f in ranks) == (backward not in EXACT)


def test_auto_takes_the_exchange_that_sends_less(pools):
    assert pools(2).run(chosen, 64, 3) == [{"bag.weight": "unique", "row.weight": "unique"}] * 2
    assert [f["bag.weight"] for f in pools(2).run(chosen, 5, ROWS)] == ["pooled"] * 2


TABLES = {
    "table_wise": {"bag": {"sharding": "table_wise", "ranks": [0]}, "row": {"sharding": "table_wise", "ranks": [1]}},
    "row_wise": {"*": {"sharding": "row_wise"}},
    "column_wise": {"*": {"sharding": "column_wise"}},
    "mixed": {"bag": {"sharding": "row_wise"}, "row": {"sharding": "column_wise"}},
}


@pytest.mark.parametrize("tables", list(TABLES))
def test_one_exchange_of_ids_and_one_of_rows_and_no_byte_too_many(pools, tables):
    for rank, found in enumerate(pools(2).run(counted, TABLES[tables])):
        assert found["nodes"] == ["exchange_ids", "send_rows"]
        sent = dict(found["sent"])
        ids = {"bag.weight": ids_of(rank)[0], "row.weight": ids_of(rank)[1][:, None]}
        theirs = {"bag.weight": ids_of(1 - rank)[0], "row.weight": ids_of(1 - rank)[1][:, None]}
        asked = numbers = lengths = answered = 0
        for name, layout in found["layouts"].items():
            for shard in layout.shards:
                here = theirs[name] if shard.rank == rank else ids[name]
                inside = ((here >= shard.row) & (here < shard.row + shard.rows)).sum(1)
                if shard.rank == rank:
                    answered += int((inside > 0).sum()) * shard.columns
                else:
                    asked += int((inside > 0).sum()) * shard.columns
                    numbers += int(inside.sum())
                    some = inside[inside > 0]
                    lengths += 0 if len(some.unique()) <= 1 else len(some)
        assert sent["the exchange of ids"] == 4 * (numbers + lengths)
        assert sent["the exchange of rows"] == 4 * answered
        assert sent["the exchange of rows' gradients"] == 4 * asked
        assert len(found["sent"]) == 4  # and the counts


def test_rows_are_cut_evenly_or_by_what_the_sample_reads(pools):
    assert all(f == {"rows": [20, 20], "same": True} for f in pools(2).run(cut, "even"))
    found = pools(2).run(cut, "sample")
    assert found[0] == found[1] and found[0]["same"] and 3 <= found[0]["rows"][0] <= 5
