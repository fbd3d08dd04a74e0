"""Every store gives the rows of the version: shard servers over Flight, a Redis Cluster, and a cache in front of either."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tablewright as tw
import torch
from serving_models import ROOT, arrays, close, every_lookup_inputs, exported, plain, without_torch
from serving_nodes import address, redis_cluster, shard_servers  # noqa: F401  (a fixture)
from tablewright.kernels.gather.hot_rows import HotRows, mixed
from tablewright.kernels.gather.local import LocalStore
from tablewright.kernels.gather.redis_rows import publish
from tablewright.kernels.gather.tables import Shard, Table
from tablewright.kernels.gather.unique import Unique
from tablewright.rewriter.serving import manifest as manifests
from tablewright.rewriter.serving.stores import open_store, published

WAIT = 5000  # ms: these tests are about rows, on a machine that may be busy


@pytest.fixture(scope="module")
def nodes():
    with shard_servers(exported(3)[1], 3) as running:
        yield running


def _rows(store, manifest, seed=0):
    """All rows of all tables, some of them twice and in no order."""
    rng = np.random.default_rng(seed)
    asked = [(name, rng.permutation(np.concatenate([np.arange(t.rows), rng.integers(0, t.rows, 20)]))) for name, t in manifest.tables.items()]
    return store.lookup_many(asked + asked[:2] + [(asked[0][0], np.empty(0, np.int64))])


def _same(got, wanted) -> bool:
    return len(got) == len(wanted) and all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(got, wanted))


class _Asked:
    """A store that notes what it is asked for; row ``i`` of table ``t`` is ``[t, i]``."""

    def __init__(self, tables):
        self.number, self.calls = {name: i for i, name in enumerate(tables)}, []

    def lookup_many(self, requests, out):
        self.calls.append([(name, ids.tolist()) for name, ids in requests])
        for (name, ids), rows in zip(requests, out):
            rows[...] = np.stack([np.full(len(ids), self.number[name]), ids], 1)
        return out


@pytest.mark.parametrize("asked, passed_on", [
    ([("a", [5, 3]), ("b", [5, 1])], [("a", [5, 3]), ("b", [5, 1])]),  # nothing twice: as it is
    ([("a", [5, 3, 5]), ("b", [])], [("a", [3, 5])]),
    ([("b", []), ("a", [2])], [("a", [2])]),
    ([("a", [1]), ("b", [4]), ("a", [0])], [("a", [0, 1]), ("b", [4])]),  # a table twice, though no row
    ([("a", [5, 3]), ("cut", [9, 1])], [("a", [3, 5]), ("cut", [1, 9])]),  # a table of several shards: ascending
    ([("cut", [9, 1, 9])], [("cut", [1, 9])]),
    ([("a", [])], []),
])  # fmt: skip
def test_each_row_is_asked_for_once_and_given_where_it_was_asked(asked, passed_on):
    shard = lambda first: Shard("f", 0, first, 5, 40, "")  # noqa: E731
    tables = {name: Table(name, 10, 2, shards=(shard(0), shard(5)) if name == "cut" else (shard(0),)) for name in ("a", "b", "cut")}
    store = _Asked(tables)
    found = Unique(store, tables).lookup_many([(name, np.array(ids, np.int64)) for name, ids in asked])
    assert store.calls == [passed_on]
    assert [rows.tolist() for rows in found] == [[[store.number[name], i] for i in ids] for name, ids in asked]


@pytest.mark.parametrize("cache_rows", [0, 40, 1000])
def test_shard_servers_give_the_rows_of_the_files(nodes, cache_rows):
    manifest = manifests.read(exported(3)[1])
    local, remote = open_store(manifest), open_store(manifest, address(nodes), deadline_ms=WAIT, cache_rows=cache_rows)
    for seed in range(4):
        assert _same(_rows(remote, manifest, seed), _rows(local, manifest, seed))
    remote.close()


def test_one_request_a_node_and_each_row_once(nodes):
    model, home = exported(3)
    p = tw.load_serving(home, address(nodes), deadline_ms=WAIT)
    before = p.stats()["store"]
    inputs = every_lookup_inputs(30, 3)
    assert close(p(**arrays(inputs))["score"], plain(model, inputs)["score"])
    after = p.stats()["store"]
    wanted = [("user", inputs["history"]), ("user", inputs["user"]), ("item", inputs["item"]), ("item", inputs["values"]),
              ("recent", inputs["values"] % 40), ("best", inputs["history"] % 40), ("weighted", inputs["history"] % 33),
              ("short", inputs["item"] % 30), ("free", inputs["user"] % 20)]  # fmt: skip
    different = {(name, int(i)) for name, ids in wanted for i in ids.reshape(-1)}
    assert after["requests"] - before["requests"] == 3 and after["rows"] - before["rows"] == len(different)
    p.close()


def test_the_client_needs_no_torch(nodes):
    code = f"import tablewright as tw\np = tw.load_serving({str(exported(3)[1])!r}, {address(nodes)!r}, deadline_ms={WAIT}, cache_rows=100)\nprint(p.version)"
    assert without_torch(code) == manifests.current(exported(3)[1])


def test_a_redis_cluster_gives_the_rows_of_the_files(redis_cluster):  # noqa: F811
    model, home = exported()
    manifest = manifests.read(home)
    local = open_store(manifest)
    count = publish(published(manifest), local, redis_cluster.address.partition("://")[2])
    assert count == sum(t.rows for t in manifest.tables.values())
    for cache_rows in (0, 60):
        remote = open_store(manifest, redis_cluster.address, deadline_ms=WAIT, cache_rows=cache_rows)
        for seed in range(3):
            assert _same(_rows(remote, manifest, seed), _rows(local, manifest, seed))
        remote.close()
    p = tw.load_serving(home, redis_cluster.address, deadline_ms=WAIT)
    before, inputs = p.stats()["store"]["requests"], every_lookup_inputs(9, 5)
    assert close(p(**arrays(inputs))["score"], plain(model, inputs)["score"])
    assert p.stats()["store"]["requests"] - before == 3
    p.close()


class _Crossed(_Asked):
    """While it is asked for rows, another thread gets the same ones through the same cache."""

    def __init__(self, tables):
        super().__init__(tables)
        self.cache, self.inside = None, False

    def lookup_many(self, requests, out):
        if not self.inside:
            self.inside = True
            for _ in range(2):  # the second finds them, so that they count as used
                self.cache.lookup_many(requests, [np.empty_like(rows) for rows in out])
            self.inside = False
        return super().lookup_many(requests, out)


def test_two_threads_that_miss_the_same_row_keep_it_once():
    tables = {"a": Table("a", 10, 2)}
    store = _Crossed(tables)
    store.cache = cache = HotRows(store, tables, 40)
    for _ in range(3):
        out = [np.empty((4, 2), np.float32)]
        cache.lookup_many([("a", np.array([7, 2, 9, 0]))], out)
        assert out[0].tolist() == [[0, 7], [0, 2], [0, 9], [0, 0]]
    numbers = cache._slots[8].numbers
    assert sorted(numbers[numbers >= 0].tolist()) == [0, 2, 7, 9]


def test_the_cache_is_exact_and_spares_the_store():
    manifest = manifests.read(exported()[1])
    inner = LocalStore(manifest.tables, manifest.root)
    asked = []
    plain_lookup = inner.lookup_many
    inner.lookup_many = lambda requests, out: asked.append(sum(len(ids) for _, ids in requests)) or plain_lookup(requests, out)  # type: ignore[method-assign]
    cache = HotRows(inner, manifest.tables, 120)
    store, rng = Unique(cache, manifest.tables), np.random.default_rng(0)
    for _ in range(300):
        requests = [(name, np.minimum(rng.zipf(1.6, 12) - 1, t.rows - 1)) for name, t in manifest.tables.items()]
        assert _same(store.lookup_many(requests), plain_lookup(requests))
    stats = store.stats()
    assert stats["misses"] == sum(asked) and stats["hits"] > 2 * stats["misses"]


def test_another_languages_onnx_runtime_serves_the_same(redis_cluster, tmp_path):  # noqa: F811
    """``examples/serve_from_node``: Node's ONNX Runtime on dense.onnx, rows over Redis."""
    example = ROOT / "examples" / "serve_from_node"
    modules = Path(os.environ.get("TABLEWRIGHT_NODE_MODULES", example / "node_modules"))
    if not shutil.which("node") or not (modules / "onnxruntime-node").is_dir():
        pytest.skip(f"needs node and: npm install --prefix {example} --ignore-scripts onnxruntime-node ioredis")
    model = torch.nn.ModuleDict({"a": torch.nn.Embedding(40, 8), "b": torch.nn.Embedding(50, 8)})
    model.forward = lambda dense, ids: torch.cat([dense, model["a"](ids[:, 0]), model["b"](ids[:, 1])], 1) @ torch.ones(19, 2)
    dense, ids = torch.randn(5, 3), torch.randint(40, (5, 2))
    tw.export_serving(model.eval(), (dense, ids), tmp_path / "m", row_dtype={"a": "int8_rowwise"})
    manifest = manifests.read(tmp_path / "m")
    publish(published(manifest), open_store(manifest), redis_cluster.address.partition("://")[2])
    body = {name: {"shape": list(t.shape), "data": t.flatten().tolist()} for name, t in (("dense", dense), ("ids", ids))}
    (tmp_path / "request.json").write_text(json.dumps(body))
    shutil.copy(example / "serve.mjs", tmp_path)
    (tmp_path / "node_modules").symlink_to(modules)
    command = ["node", "serve.mjs", str(tmp_path / "m"), redis_cluster.address.partition("://")[2], "request.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    got = np.array(json.loads(done.stdout)["output"]["data"], np.float32).reshape(5, 2)
    assert np.array_equal(got, tw.load_serving(tmp_path / "m")(dense=dense.numpy(), ids=ids.numpy()))


def test_ids_with_one_last_digit_are_spread():
    for numbers in (np.arange(0, 10_000_000, 1000), np.arange(10_000) << 20):
        counts = np.bincount((mixed(numbers) % np.uint64(24)).astype(int), minlength=24)
        assert counts.min() > 0.8 * counts.mean() and counts.max() < 1.2 * counts.mean()


@pytest.mark.parametrize("store, said", [
    ("flight:/localhost:1", "store is 'flight:/localhost:1'"), ("redis://localhost:1", "did you mean 'redis-cluster'"),
    ("flight://localhost", "must be host:port"), ("local://x", "store is"), ("redis-cluster://localhost:x", "must be host:port"),
])  # fmt: skip
def test_wrong_addresses_are_named(store, said):
    with pytest.raises(ValueError, match=said):
        tw.load_serving(exported()[1], store)
    with pytest.raises(ValueError, match="cache_rows"):
        tw.load_serving(exported()[1], cache_rows=5)
