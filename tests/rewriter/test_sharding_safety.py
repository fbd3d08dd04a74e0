"""Checkpoints that other numbers of ranks can read, and ranks that fail."""
from __future__ import annotations

import pytest
from ranks import Pool, Pools
from sharding_safety import (
    case_of,
    clipped,
    epochs,
    failed,
    from_meta,
    frozen,
    groups_taken,
    kept_gradients,
    killed,
    load,
    load_plain,
    normalised,
    of_one_table,
    other_plans,
    refused,
    save,
    states,
    watched_gradients,
    wrong_ids,
)


@pytest.fixture(scope="module")
def pools():
    made = Pools()
    yield made
    made.close()


@pytest.mark.parametrize(
    ("sharding", "mode", "optimizer", "asynchronous"),
    [("row_wise", "step", "rowwise_adagrad", False), ("column_wise", "step", "rowwise_adagrad", True), ("table_wise", "step", "adam", False),
     ("grid_shard", "torch", "sgd", False), ("table_row_wise", "step", "rowwise_adagrad", False)],
)  # fmt: skip
def test_saved_by_four_loaded_by_three_and_by_the_plain_model(pools, tmp_path, sharding, mode, optimizer, asynchronous):
    saver, loader = case_of(4, sharding, mode, optimizer), case_of(3, sharding, mode, optimizer)
    pools(4).run(save, saver, str(tmp_path), asynchronous)
    pools(3).run(load, loader, str(tmp_path), 4)
    load_plain(str(tmp_path), 4, saver)


@pytest.mark.parametrize("sharding", ["table_wise", "row_wise", "grid_shard"])
def test_state_dict_has_plain_names_and_shapes(pools, sharding):
    pools(3).run(states, sharding)


def test_an_id_outside_its_table_stops_all_ranks_together(pools):
    said = pools(3).run(wrong_ids)
    assert said[2].startswith("IndexError: id 23") and "user" in said[2]
    assert all(s.startswith("PeerError: rank 2 was given ids") for s in said[:2])


def test_ranks_with_other_plans_are_told(pools):
    said = pools(2).run(other_plans)
    assert all("the ranks resolved different plans" in s and "user.weight" in s for s in said)


@pytest.mark.parametrize(
    ("sharding", "mode", "norm_type"),
    [("row_wise", "torch", 2.0), ("column_wise", "torch", float("inf")), ("table_wise", "step", 2.0), ("row_wise", "step", 3.0)],
)  # fmt: skip
def test_clipping_by_the_norm_is_over_all_ranks(pools, sharding, mode, norm_type):
    said = pools(2).run(clipped, case_of(2, sharding, mode, "sgd"), norm_type)
    assert all(("clip_grad_norm_(opt, max_norm)" if mode == "torch" else "Sparse") in s for s in said), said


def test_a_batch_norm_is_its_ranks_own_and_the_report_says_so(pools):
    assert all(len(said) == 1 and "its rank's own" in said[0] for said in pools(2).run(normalised))


def test_gradients_are_averaged_after_a_backward_that_was_refused(pools):
    mine, theirs = pools(2).run(refused)
    assert mine == theirs


def test_gradients_are_averaged_after_a_backward_that_failed(pools):
    mine, theirs = pools(2).run(failed)
    assert mine == theirs


@pytest.mark.parametrize(
    ("sharding", "mode", "optimizer", "world"),
    [("table_wise", "step", "sgd", 3), ("table_wise", "torch", "rowwise_adagrad", 2), ("table_row_wise", "step", "sgd", 4), ("grid_shard", "torch", "sgd", 4),
     ("table_wise", "in_backward", "sgd", 2), ("table_row_wise", "in_backward", "sgd", 4)],
)  # fmt: skip
def test_gradients_of_one_table_are_asked_for_on_all_ranks(pools, sharding, mode, optimizer, world):
    """Ranks that hold none of its rows take part, and a table that is updated in the backward is refused by all."""
    said = pools(world).run(of_one_table, case_of(world, sharding, mode, optimizer))
    if mode != "in_backward":
        assert not any(said), said
    for each in said if mode == "in_backward" else []:
        assert len(each) == 12
        assert all("torch.autograd.grad was asked for" in text for text in each[::2]) and all("names some of the tables" in text for text in each[1::2]), each


@pytest.mark.parametrize("exchange", ["pooled", "unique"])
def test_frozen_lookups_beside_trained_ones_need_no_gradient(pools, exchange):
    assert pools(2).run(frozen, exchange) == [[False, True, False, True]] * 2


@pytest.mark.parametrize("world", [2, 3])
def test_gradients_of_large_weights_are_averaged_where_they_were_written(pools, world):
    for found in pools(world).run(kept_gradients):
        assert all(found), found


@pytest.mark.parametrize("world", [2, 3])
def test_hooks_have_the_ranks_own_gradient_and_may_change_it(pools, world):
    for found in pools(world).run(watched_gradients):
        assert all(found), found


def test_models_of_one_mesh_share_its_process_groups(pools):
    assert pools(2).run(groups_taken) == [0, 0]


def test_ranks_with_other_numbers_of_batches_stop_together(pools):
    assert pools(3).run(epochs) == [3, 3, 3]


@pytest.mark.parametrize("how", ["kill", "hang"])
def test_a_rank_that_dies_or_hangs_ends_the_others_and_fewer_resume(pools, tmp_path, how):
    pool = Pool(3, timeout=6)
    try:
        outcomes = pool.outcomes(killed, str(tmp_path), how, heard=2)
    finally:
        pool.close()
    for ok, value in outcomes:
        assert ok, value
        message, seconds = value
        assert "another rank died, hung" in message and seconds < 15, value
    if how == "kill":
        pools(2).run(load, case_of(2), str(tmp_path), 3)


def test_models_on_the_meta_device_are_made_in_blocks(pools):
    """No process ever holds the whole table."""
    found = pools(2).run(from_meta)
    assert [f["held"] for f in found] == [[3_000_000, 16]] * 2 and found[0]["over"] == found[1]["over"]
    for each in found:
        assert abs(each["mean"]) < 0.01 and abs(each["deviation"] - 1) < 0.02
        assert each["peak"] < 0.9 * 6_000_000 * 16 * 4
    assert found[0]["padding"] == 0
