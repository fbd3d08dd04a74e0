"""Parity with the trained model, deltas, reloads and rollbacks; no request sees two versions."""
from __future__ import annotations

import copy
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tablewright as tw
import torch
from serving_models import arrays, close, every_lookup_inputs, exported, plain
from serving_nodes import address, redis_cluster, shard_servers  # noqa: F401  (a fixture)
from tablewright.kernels.gather.redis_rows import publish
from tablewright.kernels.gather.turns import cores
from tablewright.rewriter.serving import manifest as manifests
from tablewright.rewriter.serving.stores import open_store, published
from torch import nn

WAIT = 5000


def _changed(model: nn.Module) -> nn.Module:
    """Another step of training: a few rows and the dense part moved."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.item.weight[[0, 7, 60]] += 0.5
        model.short.weight[3] = 1
        model.last.bias += 1
    return model


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    """A full version and a delta on it: (home, first model, second model, first name, second name)."""
    model, made = exported(3)
    home = shutil.copytree(made, tmp_path_factory.mktemp("versions") / "every")
    first, second = manifests.current(home), _changed(model)
    delta = tw.export_delta(second, (), home, sample_kwargs=every_lookup_inputs(6), version="delta")
    assert delta.name == "delta"
    manifests.set_current(home, first)
    return home, model, second, first, "delta"


# --- parity ------------------------------------------------------------------------------------------------------------------


def test_parity_of_float32_is_bitwise(versions):
    home, model, second, first, delta = versions
    found = tw.check_parity(model, home)
    assert found.ok and found.rows == sum(t.rows for t in manifests.read(home).tables.values()) and set(found.row_errors.values()) == {0.0}
    assert found.outputs <= 1e-6 and found.outputs == found.outputs_full
    found = tw.check_parity(second, home / delta, sample_kwargs=every_lookup_inputs(9, 4))
    assert found.ok, found


def test_parity_notices_one_bit_of_one_row_and_a_moved_bias(versions):
    home, model, *_ = versions
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.best.weight[5, 0] = torch.nextafter(other.best.weight[5, 0], torch.tensor(9.0))
    found = tw.check_parity(other, home)
    assert not found.ok and found.wrong_rows["best"] == 1 and sum(found.wrong_rows.values()) == 1
    with pytest.raises(tw.VerifyError, match="1 wrong"):
        found.raise_if_failed()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.last.bias += 1e-4
    found = tw.check_parity(other, home)
    assert not found.ok and not any(found.wrong_rows.values()) and found.outputs > 1e-6


@pytest.mark.parametrize("row_dtype", ["float16", "int8_rowwise"])
def test_parity_of_fewer_bits_is_within_their_bounds(row_dtype, tmp_path):
    model = exported()[0]
    tw.export_serving(model, (), tmp_path / "m", sample_kwargs=every_lookup_inputs(6), row_dtype=row_dtype)
    found = tw.check_parity(model, tmp_path / "m")
    assert found.ok and 0 < found.outputs_full and max(found.row_errors.values()) > 0, found
    largest = max(float(t.detach().abs().max()) for t in (model.item.weight, model.user.weight, model.free))
    assert max(found.row_errors.values()) < (largest * 2**-10 if row_dtype == "float16" else largest / 200)


def test_parity_over_shard_servers(versions):
    home, model, second, first, delta = versions
    with shard_servers(home, 2) as nodes:
        assert tw.check_parity(model, home / first, address(nodes)).ok
        assert tw.check_parity(second, home / delta, address(nodes)).ok
        assert not tw.check_parity(second, home / first, address(nodes)).ok


# --- deltas ------------------------------------------------------------------------------------------------------------------


def test_a_delta_holds_only_what_changed(versions):
    home, _, _, first, delta = versions
    tables = manifests.read(home / delta).tables
    assert {name: t.changes.rows.rows for name, t in tables.items()} == {
        "user": 0, "item": 3, "recent": 0, "best": 0, "weighted": 0, "short": 1, "free": 0}  # fmt: skip
    assert np.fromfile(home / delta / tables["item"].changes.ids.file, "<i8").tolist() == [0, 7, 60]
    assert sum(f.stat().st_size for f in (home / delta / "tables").rglob("*") if f.is_file()) == 4 * 8 + 4 * 8 * 4


def test_a_delta_is_served_by_a_redis_cluster(versions, redis_cluster):  # noqa: F811
    home, _, second, first, delta = versions
    at = redis_cluster.address.partition("://")[2]
    for name in (first, delta):
        manifest = manifests.read(home / name)
        written = publish(published(manifest), open_store(manifest), at)
    assert written == 4
    p = tw.load_serving(home / delta, redis_cluster.address, deadline_ms=WAIT)
    inputs = every_lookup_inputs(20, 3)
    assert close(p(**arrays(inputs))["score"], plain(second, inputs)["score"])
    p.close()


def test_a_delta_without_its_base_or_on_another_model_is_refused(versions, tmp_path):
    home, model, second, first, delta = versions
    lone = shutil.copytree(home, tmp_path / "m")
    shutil.rmtree(lone / first)
    with pytest.raises(tw.VersionSkew, match="which is not there"):
        tw.load_serving(lone / delta)
    other = copy.deepcopy(model)
    other.best = nn.EmbeddingBag(41, 8, mode="max", padding_idx=1)
    with pytest.raises(tw.ExportError, match=r"table 'best' is \[41, 8\] in the model and \[40, 8\]"):
        tw.export_delta(other, (), home, sample_kwargs=every_lookup_inputs(6))
    with pytest.raises(tw.ExportError, match=f"name the full version '{first}'"):
        tw.export_delta(second, (), home, base=delta, sample_kwargs=every_lookup_inputs(6))


# --- reload and rollback -----------------------------------------------------------------------------------------------------


def test_reload_and_rollback(versions, tmp_path):
    home, model, second, first, delta = versions
    home = shutil.copytree(home, tmp_path / "m")
    p, inputs = tw.load_serving(home), every_lookup_inputs(6)
    assert p.version == first and p.reload() == first
    manifests.set_current(home, delta)
    assert p.version == first and p.reload() == delta
    assert close(p(**arrays(inputs))["score"], plain(second, inputs)["score"])
    assert p.rollback() == first and manifests.current(home) == first
    assert close(p(**arrays(inputs))["score"], plain(model, inputs)["score"])
    manifests.set_current(home, delta)
    fresh = tw.load_serving(home)
    assert fresh.version == delta and fresh.rollback() == first  # known from the manifest
    with pytest.raises(tw.ServingError, match="is the first one"):
        tw.load_serving(home).rollback()


def test_a_reload_that_fails_leaves_the_present_version(versions, tmp_path):
    home, model, _, first, delta = versions
    home = shutil.copytree(home, tmp_path / "m")
    p, inputs = tw.load_serving(home), every_lookup_inputs(6)
    file = home / delta / manifests.read(home / delta).tables["item"].changes.rows.file
    raw = bytearray(file.read_bytes())
    raw[5] ^= 1
    file.write_bytes(raw)
    with pytest.raises(tw.CorruptShard, match="changed.rows"):
        p.reload(delta)
    assert p.version == first and close(p(**arrays(inputs))["score"], plain(model, inputs)["score"])
    with pytest.raises(tw.ExportError, match="nothing is neither an exported version"):
        p.reload("nothing")


class Tagged(nn.Module):
    """Its answer tells which version its rows and which its dense part came from."""

    def __init__(self, tag: float):
        super().__init__()
        self.a, self.b = nn.Embedding(300, 4), nn.EmbeddingBag(200, 4, mode="sum")
        nn.init.constant_(self.a.weight, tag)
        nn.init.constant_(self.b.weight, tag)
        self.last = nn.Linear(8, 1)
        nn.init.constant_(self.last.weight, tag)
        nn.init.constant_(self.last.bias, 0)

    def forward(self, a, b):
        return self.last(torch.cat([self.a(a), self.b(b)], 1))


@pytest.mark.parametrize("at_once", [1, 2, None])
def test_threads_take_turns(versions, monkeypatch, at_once):
    p, now, peak, lock = tw.load_serving(versions[0], at_once=at_once), [0], [0], threading.Lock()
    run = p._version.run

    def counted(given):
        with lock:
            now[0] += 1
            peak[0] = max(peak[0], now[0])
        time.sleep(0.005)
        outputs = run(given)
        with lock:
            now[0] -= 1
        return outputs

    monkeypatch.setattr(p._version, "run", counted)
    inputs = arrays(every_lookup_inputs(6))
    wanted = p(**inputs)["score"]
    with ThreadPoolExecutor(2 * cores()) as pool:
        assert all(np.array_equal(each["score"], wanted) for each in pool.map(lambda _: p(**inputs), range(50)))
    assert peak[0] == (at_once or cores())
    with pytest.raises(tw.InputError):
        p(**{**inputs, "user": inputs["user"].astype(np.float32)})
    assert np.array_equal(p(**inputs)["score"], wanted)


def test_no_turns_is_an_error(versions):
    with pytest.raises(ValueError, match="at_once is 0; it must be 1 or more"):
        tw.load_serving(versions[0], at_once=0)


@pytest.mark.parametrize("remote", [False, True])
def test_no_request_sees_two_versions(remote, tmp_path):
    sample = (torch.arange(4), torch.arange(12).reshape(4, 3))
    home = tmp_path / "m"
    for tag in (1, 2):
        tw.export_serving(Tagged(tag), sample, home, version=f"v{tag}", shards=2)
    right = {"v1": 1 * (4 * 1 + 4 * 3), "v2": 2 * (4 * 2 + 4 * 3 * 2)}
    with shard_servers(home, 2) as nodes:
        p = tw.load_serving(home, address(nodes) if remote else "local", deadline_ms=WAIT, cache_rows=50 if remote else 0)
        seen, wrong, done = {"v1": 0, "v2": 0}, [], threading.Event()

        def ask(seed):
            rng = np.random.default_rng(seed)
            while not done.is_set():
                result, version = p.answer({"a": rng.integers(0, 300, 5), "b": rng.integers(0, 200, (5, 3))})
                name = version.manifest.version
                seen[name] += 1
                if not (result == right[name]).all():
                    wrong.append((name, result))

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for name in ("v1", "v2", "v1", "v2", "v1"):
            before = dict(seen)
            assert p.reload(name) == name
            while seen[name] < before[name] + 20 and all(t.is_alive() for t in threads):
                pass
        done.set()
        for thread in threads:
            thread.join()
        assert not wrong and min(seen.values()) >= 40 and p.stats()["failures"] == 0
        p.close()
