"""The Open Inference Protocol over HTTP: a server process, and the application itself for bounds and batches."""
from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import tablewright as tw
from serving_models import arrays, close, every_lookup_inputs, exported, plain, towers, two_towers_inputs
from serving_nodes import PYTHON, Process, eventually, free_port
from starlette.testclient import TestClient
from tablewright.rewriter.serving import manifest as manifests
from tablewright.rewriter.serving.batcher import Batcher, Busy
from tablewright.rewriter.serving.http_server import make_app

_TYPES = {"float32": "FP32", "int64": "INT64"}


def _body(inputs: dict, **more) -> dict:
    return {"inputs": [{"name": n, "shape": list(a.shape), "datatype": _TYPES[a.dtype.name], "data": a.reshape(-1).tolist()} for n, a in inputs.items()], **more}


def _output(answer: dict, name: str) -> np.ndarray:
    (found,) = [o for o in answer["outputs"] if o["name"] == name]
    return np.array(found["data"], np.float32).reshape(found["shape"])


@pytest.fixture(scope="module")
def server():
    port = free_port()
    process = Process([*PYTHON, "-m", "tablewright", "serve", str(exported()[1]), "--port", str(port)], port, "on http://")
    url = f"http://127.0.0.1:{port}"

    def up() -> bool:
        try:
            return httpx.get(f"{url}/v2/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    eventually(up)
    yield url
    process.child.terminate()
    assert process.child.wait(20) == -15 or process.child.returncode == 0
    process.end()


def test_the_protocol_over_a_real_server(server):
    model, home = exported()
    about = httpx.get(f"{server}/v2/models/every").json()
    assert about["name"] == "every" and about["versions"] == [manifests.current(home)]
    assert about["inputs"][0] == {"name": "dense", "datatype": "FP32", "shape": [-1, 3]} and about["outputs"][0] == {
        "name": "score", "datatype": "FP32", "shape": [-1]}  # fmt: skip
    assert httpx.get(f"{server}/v2/health/live").json() == {"live": True} and httpx.get(f"{server}/v2/models/every/ready").json()["ready"]
    inputs = every_lookup_inputs(7, 3)
    wanted = plain(model, inputs)
    answer = httpx.post(f"{server}/v2/models/every/infer", json=_body(arrays(inputs), id="a7")).json()
    assert answer["id"] == "a7" and answer["model_version"] == manifests.current(home)
    assert close(_output(answer, "score"), wanted["score"]) and close(_output(answer, "user"), wanted["user"])
    answer = httpx.post(f"{server}/v2/models/every/versions/{manifests.current(home)}/infer", json=_body(arrays(inputs), outputs=[{"name": "user"}])).json()
    assert [o["name"] for o in answer["outputs"]] == ["user"]
    metrics = httpx.get(f"{server}/metrics").text
    assert 'tablewright_requests_total{status="200"} 2.0' in metrics and "tablewright_batch_rows_bucket" in metrics
    assert f'tablewright_version{{digest="{manifests.read(home).digest[:12]}",model="every",version="{manifests.current(home)}"}} 1.0' in metrics


@pytest.mark.parametrize("change, status, said", [
    (lambda b: b["inputs"][2]["data"].__setitem__(0, 61), 400, "id 61 is not a row of table 'item'"),
    (lambda b: b["inputs"][2]["data"].__setitem__(0, 1.5), 400, "input 'item' is not INT64"),
    (lambda b: b["inputs"][2].update(shape=[8]), 400, "input 'item' is not INT64 of shape"),
    (lambda b: b["inputs"][2].update(datatype="INT65"), 400, "datatype 'INT65'"),
    (lambda b: b["inputs"][2]["data"].__setitem__(0, 1 << 70), 400, "input 'item' is not INT64"),
    (lambda b: b["inputs"].pop(), 400, "input 'weights' is missing"),
    (lambda b: b["inputs"].append(b["inputs"][0]), 400, "'dense' is given twice"),
    (lambda b: b.update(inputs=3), 400, 'no list "inputs"'),
    (lambda b: b.update(outputs=[{"name": "scores"}]), 400, "no output 'scores'"),
])  # fmt: skip
def test_wrong_requests(server, change, status, said):
    body = _body(arrays(every_lookup_inputs(6)))
    change(body)
    answer = httpx.post(f"{server}/v2/models/every/infer", json=body)
    assert answer.status_code == status and said in answer.json()["error"]


def test_other_paths_and_bodies(server):
    for path, status, said in (("models/other/infer", 404, "no model 'other'"), ("models/every/versions/7/infer", 404, "version '7'")):
        answer = httpx.post(f"{server}/v2/{path}", json={})
        assert answer.status_code == status and said in answer.json()["error"]
    for content in (b"{", b"[]", b"[" * 100_000):
        answer = httpx.post(f"{server}/v2/models/every/infer", content=content)
        assert answer.status_code == 400 and "JSON" in answer.json()["error"]
    assert httpx.post(f"{server}/v2/models/every/infer", content=b"x" * (17 << 20)).status_code == 413
    assert httpx.post(f"{server}/v2/models/every/infer", content=(b"x" * (1 << 20) for _ in range(17))).status_code == 413  # chunked, no length
    assert httpx.post(f"{server}/v2/models/every/infer", json=_body(arrays(every_lookup_inputs(6)))).status_code == 200


class _Held:
    """A predictor whose runs wait until they may go, and that notes the rows of each."""

    def __init__(self, predictor):
        self._version, self.rows, self.go, self._predictor = predictor._version, [], threading.Event(), predictor

    def outputs(self, inputs):
        self.rows.append(len(inputs["item_id"]))
        assert self.go.wait(20)
        return self._predictor.outputs(inputs)


def test_what_waits_runs_together_and_is_answered_apart():
    model, home = towers()
    held = _Held(tw.load_serving(home))
    batcher = Batcher(held, max_rows=20)
    requests = [two_towers_inputs(n) for n in (2, 3, 4, 5, 9)]
    other = {**two_towers_inputs(2), "user_history": two_towers_inputs(2)["user_history"][:, :4]}  # another length: apart
    once = two_towers_inputs(6, users=1)
    futures = [batcher.submit(arrays(requests[0]))]
    eventually(lambda: held.rows == [2])
    futures += [batcher.submit(arrays(each)) for each in (*requests[1:], other, once)]
    held.go.set()
    results = [each.result(20)[0]["output"] for each in futures]
    assert held.rows == [2, 12, 9, 2, 6]  # 3 + 4 + 5 together; 9 more would be above 20
    for request, got in zip([*requests, other], results):
        assert close(got, plain(model, request))
    batcher.close()
    with pytest.raises(Busy, match="shutting down"):
        batcher.submit(arrays(other))


def test_one_wrong_id_is_no_error_of_the_others():
    model, home = towers()
    held = _Held(tw.load_serving(home))
    batcher = Batcher(held)
    good, bad = two_towers_inputs(3), two_towers_inputs(2)
    bad["item_id"][0] = 200
    first = batcher.submit(arrays(good))
    eventually(lambda: held.rows == [3])
    second, third = batcher.submit(arrays(good)), batcher.submit(arrays(bad))
    held.go.set()
    assert close(first.result(20)[0]["output"], plain(model, good)) and close(second.result(20)[0]["output"], plain(model, good))
    with pytest.raises(tw.IdOutOfRange, match="id 200"):
        third.result(20)
    batcher.close()


def test_too_many_waiting_are_refused():
    held = _Held(tw.load_serving(towers()[1]))
    batcher = Batcher(held, max_waiting=2)
    requests = arrays(two_towers_inputs(2))
    futures = [batcher.submit(requests)]
    eventually(lambda: held.rows == [2])
    futures += [batcher.submit(requests), batcher.submit(requests)]
    with pytest.raises(Busy, match="2 requests wait already"):
        batcher.submit(requests)
    held.go.set()
    assert all(each.result(20) for each in futures)
    batcher.close()


def test_jagged_requests_are_never_joined():
    p, seen = tw.load_serving(exported()[1]), []
    batcher = Batcher(p, observe=lambda requests, rows: seen.append(requests))
    model, inputs = exported()[0], [every_lookup_inputs(4, seed) for seed in range(12)]
    futures = [batcher.submit(arrays(each)) for each in inputs]
    assert all(close(f.result(20)[0]["score"], plain(model, each)["score"]) for f, each in zip(futures, inputs))
    assert seen == [1] * 12
    batcher.close()


def test_reload_and_rollback_over_http_under_load(tmp_path):
    import shutil

    model, made = towers()
    home = shutil.copytree(made, tmp_path / "towers")
    first = manifests.current(home)
    shutil.copytree(home / first, tmp_path / "other")
    with TestClient(make_app(tw.load_serving(home), workers=2)) as client, ThreadPoolExecutor(4) as pool:
        inputs = two_towers_inputs(4)
        body, wanted, done = json.dumps(_body(arrays(inputs))), plain(model, inputs), threading.Event()

        def ask() -> int:
            count = 0
            while not done.is_set():
                answer = client.post("/v2/models/towers/infer", content=body)
                assert answer.status_code == 200 and close(_output(answer.json(), "output"), wanted), answer.text
                count += 1
            return count

        asking = [pool.submit(ask) for _ in range(3)]
        tw.export_delta(model, tuple(inputs.values()), home, version="second")
        assert client.post("/v2/repository/models/towers/load").json()["version"] == "second"
        assert client.post("/v2/repository/models/towers/rollback").json()["version"] == first and manifests.current(home) == first
        assert client.post("/v2/repository/models/towers/load", json={"parameters": {"version": "second"}}).json()["version"] == "second"
        answer = client.post("/v2/repository/models/towers/load", json={"parameters": {"version": "third"}})
        assert answer.status_code == 500 and "third" in answer.json()["error"]
        done.set()
        assert all(each.result(20) > 0 for each in asking)


def test_current_is_watched(tmp_path):
    import shutil

    home = shutil.copytree(towers()[1], tmp_path / "towers")
    first = manifests.current(home)
    p = tw.load_serving(home)
    with TestClient(make_app(p, watch=0.05)) as client:
        (home / "CURRENT").write_text("nothing\n")  # refused, and said in the log
        time.sleep(0.2)
        assert client.get("/v2/models/towers").json()["versions"] == [first]
        tw.export_delta(towers()[0], tuple(two_towers_inputs(5).values()), home, base=first, version="second")
        eventually(lambda: client.get("/v2/models/towers").json()["versions"] == ["second"])
