"""What bad requests, damaged files, hung and dead nodes, and half-published versions get: an error by name, in time, and then recovery."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tablewright as tw
import torch
from serving_models import BLOCKED, arrays, close, every_lookup_inputs, exported, plain, towers, two_towers_inputs
from serving_nodes import address, eventually, package_path, redis_cluster, shard_server, shard_servers  # noqa: F401
from tablewright.kernels.gather.redis_rows import publish, retire
from tablewright.rewriter.serving import manifest as manifests
from tablewright.rewriter.serving.export import _remove_unfinished
from tablewright.rewriter.serving.stores import open_store, published

SLACK = 5.0  # seconds that a busy machine may add to a deadline; a hang would last for ever


@pytest.fixture(scope="module")
def p():
    return tw.load_serving(exported()[1])


def _inputs(**changes) -> dict:
    return {**arrays(every_lookup_inputs(6)), **changes}


# --- requests ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, error, said", [
    ({"item": np.array([0, 1, 61, 3, 99, 5])}, tw.IdOutOfRange, "id 61 is not a row of table 'item', which has 61 rows.*2 of the 6 ids in input 'item'"),
    ({"item": np.array([0, -1, 2, 3, 4, 5])}, tw.IdOutOfRange, "id -1 is not a row of table 'item'"),
    ({"item": np.array([0, 1, 2, 3, 4, 5.0])}, tw.InputTypeError, "input 'item' is float64; the model takes int64"),
    ({"item": np.array([True] * 6)}, tw.InputTypeError, "input 'item' is bool"),
    ({"item": np.array([1 << 63] * 6, np.uint64)}, tw.InputTypeError, "input 'item' holds numbers that int64 does not"),
    ({"dense": np.zeros((6, 3))}, tw.InputTypeError, "input 'dense' is float64; the model takes float32"),
    ({"dense": np.zeros((6, 4), np.float32)}, tw.InputError, r"input 'dense' has shape \[6, 4\]; \[batch, 3\] was needed"),
    ({"dense": np.zeros(6, np.float32)}, tw.InputError, r"input 'dense' has shape \[6\]"),
    ({"dense": np.zeros((5, 3), np.float32)}, tw.InputError, "'dense' and 'user' have 5 and 6 rows; they must be equal"),
    ({"ends": np.zeros(6, int)}, tw.InputError, "'dense' and 'ends' have 6 and 5 rows"),
    ({"offsets": np.array([1, 1, 1, 1, 1, 1])}, tw.InputError, "input 'offsets' starts at 1"),
    ({"offsets": np.array([0, 2, 1, 2, 3, 3])}, tw.InputError, "input 'offsets' decreases at position 2"),
    ({"offsets": np.array([0, 2, 2, 2, 3, 300])}, tw.InputError, "input 'offsets' reaches 300, and input 'values' has"),
    ({"dense": "text"}, tw.InputTypeError, "input 'dense' is <U4"),
    ({"dense": [[1, 2], [3]]}, tw.InputError, "input 'dense' is not an array"),
    ({"itme": np.zeros(6, int)}, tw.InputError, "there is no input 'itme' .did you mean 'item'"),
])  # fmt: skip
def test_a_wrong_request_is_named_before_anything_is_looked_up(p, changes, error, said):
    looked = []
    store, p._version.store = p._version.store, None
    try:
        p._version.store = store
        original = store.lookup_many
        store.lookup_many = lambda requests: looked.append(1) or original(requests)
        with pytest.raises(error, match=said) as caught:
            p(**_inputs(**changes))
        assert isinstance(caught.value, tw.ServingError)
        assert not looked or "offsets" in changes  # bags are made of rows
    finally:
        del store.lookup_many
    with pytest.raises(tw.InputError, match="input 'item' is missing"):
        p(**{k: v for k, v in _inputs().items() if k != "item"})


def test_lossless_casts_and_lists_are_taken(p):
    wanted = p(**_inputs())["score"]
    inputs = _inputs()
    changes = {"user": inputs["user"].astype(np.int32), "history": inputs["history"].astype(np.uint8), "item": inputs["item"].astype(np.uint64),
               "dense": inputs["dense"].tolist(), "weights": np.asfortranarray(inputs["weights"])}  # fmt: skip
    assert np.array_equal(p(**{**inputs, **changes})["score"], wanted)


def test_an_empty_batch_asks_no_store():
    p = tw.load_serving(towers()[1])
    p._version.store.lookup_many = None
    assert p(**arrays(two_towers_inputs(0))).shape == (0,)


@pytest.mark.parametrize("missing", ["mean", "row:7"])
def test_missing_ids_by_policy_are_counted(missing, tmp_path):
    model = exported()[0]
    tw.export_serving(model, (), tmp_path / "m", sample_kwargs=every_lookup_inputs(6), missing={"user": missing})
    p, inputs = tw.load_serving(tmp_path / "m"), _inputs()
    inputs["user"][[1, 4]] = 50, -3
    changed = {k: torch.from_numpy(v.copy()) for k, v in inputs.items()}
    user = model.user
    row = {"mean": user.weight.mean(0), "row:7": user.weight[7]}[missing].detach()
    bigger = torch.nn.Embedding.from_pretrained(torch.cat([user.weight.detach(), row[None]]))
    free = changed["user"].clone()
    changed["user"][[1, 4]] = 50
    model.user = bigger
    try:
        # `user` also goes to `free`, by user % 20 - 20: Python's remainder, on the id as it was sent
        assert (free % 20)[[1, 4]].tolist() == [10, 17] and (changed["user"] % 20)[[1, 4]].tolist() == [10, 10]
        first = plain(model, changed)["score"]
    finally:
        model.user = user
    got = p(**inputs)["score"]
    assert close(got[:4], first[:4]) and p.stats()["missing_ids"] == {"user": 2}
    with pytest.raises(tw.IdOutOfRange, match="table 'item'"):
        p(**{**inputs, "item": np.full(6, 61)})


# --- files -------------------------------------------------------------------------------------------------------------------


def _damaged(tmp_path, how):
    home = shutil.copytree(exported()[1], tmp_path / "m")
    root = home / manifests.current(home)
    shard = root / manifests.read(home).tables["item"].shards[0].file
    raw = bytearray(shard.read_bytes())
    if how == "a flipped bit":
        raw[100] ^= 4
    elif how == "a short file":
        raw = raw[:-5]
    shard.write_bytes(raw) if how != "no file" else shard.unlink()
    return home, shard


@pytest.mark.parametrize("how, said", [("a flipped bit", "sha256 is"), ("a short file", "has .* bytes; the manifest says"), ("no file", "is missing")])
def test_a_damaged_shard_is_found_at_load(how, said, tmp_path):
    home, shard = _damaged(tmp_path, how)
    with pytest.raises(tw.CorruptShard, match=f"{shard.name}.*{said}"):
        tw.load_serving(home)
    if how == "a flipped bit":  # documented: sizes alone do not show it
        tw.load_serving(home, verify="size")
    else:
        with pytest.raises(tw.CorruptShard):
            tw.load_serving(home, verify="size")


@pytest.mark.parametrize("how", ["a flipped bit", "a short file"])
def test_a_damaged_shard_on_a_server_is_named_to_the_client(how, tmp_path):
    home, shard = _damaged(tmp_path, how)
    with shard_servers(home, 1) as nodes, pytest.raises(tw.CorruptShard, match=shard.name):
        tw.load_serving(exported()[1], address(nodes))


def test_a_damaged_graph_is_found_at_load(tmp_path):
    home = shutil.copytree(exported()[1], tmp_path / "m")
    graph = home / manifests.current(home) / "dense.onnx"
    raw = bytearray(graph.read_bytes())
    raw[len(raw) // 2] ^= 1
    graph.write_bytes(raw)
    with pytest.raises(tw.CorruptShard, match="dense.onnx"):
        tw.load_serving(home)


def test_a_lookup_of_a_table_that_the_manifest_lacks_is_found_at_load(tmp_path):
    home = shutil.copytree(exported()[1], tmp_path / "m")
    path = home / manifests.current(home) / manifests.NAME
    raw = json.loads(path.read_text())
    raw["lookups"][0]["table"] = "usr"
    path.write_text(json.dumps({**raw, "digest": manifests.digest_of(raw)}))
    with pytest.raises(tw.UnknownTable, match="'usr', which the manifest does not have: user, "):
        tw.load_serving(home)


def test_a_killed_export_leaves_the_old_version_and_the_next_one_cleans_up(tmp_path):
    home = shutil.copytree(towers()[1], tmp_path / "m")
    before = manifests.current(home)
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import serving_models as s, tablewright as tw
from tablewright.rewriter.serving import export
export._record = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
tw.export_serving(s.TwoTowers().eval(), tuple(s.two_towers_inputs(5).values()), {str(home)!r})
"""
    env = {**os.environ, "PYTHONPATH": package_path()}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd="/", timeout=120, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    left = list(home.glob(".*.tmp"))
    assert len(left) == 1 and (left[0] / "dense.onnx").exists() and manifests.current(home) == before
    assert tw.load_serving(home).version == before
    _remove_unfinished(home)  # every export begins with it
    assert not list(home.glob(".*.tmp")) and tw.load_serving(home).version == before


# --- shard servers -----------------------------------------------------------------------------------------------------------


def _timed(p, inputs):
    started = time.monotonic()
    with pytest.raises(tw.ServingError) as caught:
        p(**inputs)
    return caught, time.monotonic() - started


@pytest.mark.parametrize("row_port", [0, -1], ids=["row port", "exchange"])
def test_a_node_that_hangs_or_dies_or_loses_its_files_is_named_in_time_and_found_again(row_port, tmp_path):
    model, home = exported(3)
    inputs = every_lookup_inputs(6)
    wanted = plain(model, inputs)["score"]
    with shard_servers(home, 2, row_port=row_port) as nodes:
        p = tw.load_serving(home, address(nodes), deadline_ms=400)
        node = nodes[1][0]
        node.stop()
        caught, seconds = _timed(p, arrays(inputs))
        assert caught.type is tw.StoreUnavailable and f"127.0.0.1:{node.port}" in str(caught.value) and seconds < 0.4 + SLACK
        node.go()
        eventually(lambda: _answers(p, inputs, wanted))
        node.kill()
        caught, seconds = _timed(p, arrays(inputs))
        assert caught.type is tw.StoreUnavailable and f"127.0.0.1:{node.port}" in str(caught.value) and seconds < 0.4 + SLACK
        nodes[1][0] = empty = shard_server(tmp_path, 1, 2, node.port, row_port)  # restarted, and its files are gone
        node.end()
        eventually(lambda: _timed(p, arrays(inputs))[0].type is tw.VersionSkew)
        empty.kill()
        nodes[1][0] = shard_server(home, 1, 2, node.port, row_port)
        empty.end()
        eventually(lambda: _answers(p, inputs, wanted))
        p.close()


def _answers(p, inputs, wanted) -> bool:
    try:
        return close(p(**arrays(inputs))["score"], wanted)
    except tw.StoreUnavailable:
        return False


@pytest.mark.parametrize("row_port", [0, -1], ids=["row port", "exchange"])
@pytest.mark.parametrize("how", ["stop", "kill"])
def test_another_replica_answers(how, row_port):
    model, home = exported(3)
    inputs = every_lookup_inputs(6)
    wanted = plain(model, inputs)["score"]
    with shard_servers(home, 1, replicas=2, row_port=row_port) as nodes:
        p = tw.load_serving(home, address(nodes), deadline_ms=3000)
        getattr(nodes[0][p._version.store.store._preferred[0]], how)()
        assert close(p(**arrays(inputs))["score"], wanted) and p.stats()["store"]["failovers"] == 1
        started = time.monotonic()
        for _ in range(5):
            assert close(p(**arrays(inputs))["score"], wanted)
        assert p.stats()["store"]["failovers"] == 1 and time.monotonic() - started < 1.5 + SLACK  # the dead one is not asked again
        p.close()


def test_a_node_without_the_version_or_of_another_part_is_named(tmp_path):
    model, home = towers()
    with shard_servers(exported(3)[1], 2) as nodes:
        with pytest.raises(tw.VersionSkew, match="has no version with digest"):
            tw.load_serving(home, address(nodes))
        with pytest.raises(tw.VersionSkew, match="serves part 1 of 2; the client takes it for 0 of 2"):
            tw.load_serving(exported(3)[1], address(nodes[::-1]))
        with pytest.raises(tw.VersionSkew, match="part 0 of 2; the client takes it for 0 of 1"):
            tw.load_serving(exported(3)[1], address(nodes[:1]))
        p = tw.load_serving(exported(3)[1], address(nodes), deadline_ms=5000)
        with pytest.raises(tw.UnknownTable, match="no table 'nothing'; its tables: user"):
            p._version.store.store.lookup_many([("nothing", np.arange(3))], [])
        p.close()


def test_nothing_listens_where_the_address_says():
    started = time.monotonic()
    with pytest.raises(tw.StoreUnavailable, match="no replica of node 0 can be reached"):
        tw.load_serving(exported()[1], "flight://127.0.0.1:1|127.0.0.1:2")
    with pytest.raises(tw.StoreUnavailable, match="no node of the Redis cluster answers"):
        tw.load_serving(exported()[1], "redis-cluster://127.0.0.1:1")
    assert time.monotonic() - started < 2 * SLACK


# --- Redis -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_redis(redis_cluster):  # noqa: F811
    home = exported()[1]
    manifest = manifests.read(home)
    publish(published(manifest), open_store(manifest), redis_cluster.address.partition("://")[2])
    return redis_cluster, home, manifest


def test_lost_rows_are_never_taken_for_missing_ids(in_redis):
    cluster, home, manifest = in_redis
    inputs = every_lookup_inputs(33)
    p = tw.load_serving(home, cluster.address, deadline_ms=5000)
    p(**arrays(inputs))
    key = p._version.store.store._keys[0][3].decode()
    port = p._version.store.store._owners[3][1]
    assert cluster.cli(port, "hlen", key).strip() != "0"
    cluster.cli(port, "hdel", key, "m")  # half published
    with pytest.raises(tw.StoreIncomplete, match="partition 3 .*has no sentinel"):
        p(**arrays(inputs))
    cluster.cli(port, "hset", key, "m", "other:24")
    with pytest.raises(tw.StoreIncomplete, match="has the sentinel b'other:24'"):
        p(**arrays(inputs))
    cluster.cli(port, "flushall")
    with pytest.raises(tw.StoreIncomplete, match="has no sentinel"):
        p(**arrays(inputs))
    with pytest.raises(tw.StoreIncomplete):
        tw.load_serving(home, cluster.address)
    publish(published(manifest), open_store(manifest), cluster.address.partition("://")[2])
    assert close(p(**arrays(inputs))["score"], plain(exported()[0], inputs)["score"])
    retire(published(manifest), cluster.address.partition("://")[2])
    with pytest.raises(tw.StoreIncomplete):
        p(**arrays(inputs))
    p.close()


def test_a_publisher_that_is_killed_midway_serves_nothing(in_redis, tmp_path):
    cluster, home, manifest = in_redis
    at = cluster.address.partition("://")[2]
    retire(published(manifest), at)
    code = BLOCKED + f"""
import os, signal
from tablewright.kernels.gather import redis_rows
from tablewright.kernels.gather.local import LocalStore
from tablewright.rewriter.serving import manifest as manifests
from tablewright.rewriter.serving.stores import published
m = manifests.read({str(home)!r})
class Dies(LocalStore):
    def lookup_many(self, requests):
        if requests[0][0] == "weighted":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().lookup_many(requests)
redis_rows.publish(published(m), Dies(m.tables, m.root), {at!r})
"""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": package_path()}, timeout=60, capture_output=True)
    assert done.returncode == -9, done.stderr
    with pytest.raises(tw.StoreIncomplete, match="has no sentinel"):
        tw.load_serving(home, cluster.address)
    publish(published(manifest), open_store(manifest), at)  # again, over what was left
    p = tw.load_serving(home, cluster.address, deadline_ms=5000)
    inputs = every_lookup_inputs(9)
    assert close(p(**arrays(inputs))["score"], plain(exported()[0], inputs)["score"])
    p.close()


def test_a_redis_node_that_hangs_or_restarts_empty(in_redis):
    cluster, home, manifest = in_redis
    inputs = every_lookup_inputs(33)
    wanted = plain(exported()[0], inputs)["score"]
    p = tw.load_serving(home, cluster.address, deadline_ms=300)
    node = cluster.nodes[1]
    node.stop()
    caught, seconds = _timed(p, arrays(inputs))
    assert caught.type is tw.StoreUnavailable and f"127.0.0.1:{node.port}" in str(caught.value) and seconds < 0.3 + SLACK
    node.go()
    eventually(lambda: _answers(p, inputs, wanted))
    node.kill()
    caught, seconds = _timed(p, arrays(inputs))
    assert caught.type is tw.StoreUnavailable and seconds < 0.3 + SLACK
    cluster.nodes[1] = cluster.start(node.port)
    node.end()

    def empty():
        with pytest.raises(tw.ServingError) as found:
            p(**arrays(inputs))
        assert found.type in (tw.StoreUnavailable, tw.StoreIncomplete), found.value
        return found.type is tw.StoreIncomplete

    eventually(empty)
    p.close()
