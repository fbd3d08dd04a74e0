"""``python -m tablewright serve DIR``: the Open Inference Protocol (KServe v2) over HTTP, and ``/metrics`` for Prometheus.

    GET  /v2, /v2/health/live, /v2/health/ready, /v2/models/NAME[/versions/V][/ready]
    POST /v2/models/NAME[/versions/V]/infer            tensors as JSON
    POST /v2/repository/models/NAME/load               reload: the version that CURRENT names, or {"parameters": {"version": "..."}}
    POST /v2/repository/models/NAME/rollback           back to the version before

Errors are ``{"error": "..."}``: 400 a wrong request, 404 another model or version, 413 a body above the bound, 503 too many waiting or rows
that cannot be had in time, 500 parts of different versions. No torch.
"""
from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ...kernels.errors import IdOutOfRange, InputError, StoreUnavailable
from ..errors import TablewrightError
from .batcher import Batcher, Busy
from .predictor import Predictor, Version

_DATATYPES = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64", "int8": "INT8", "int16": "INT16",
    "int32": "INT32", "int64": "INT64", "float16": "FP16", "float32": "FP32", "float64": "FP64",
}  # fmt: skip
_NUMPY = {text: name for name, text in _DATATYPES.items()}
_log = logging.getLogger("tablewright.serving")


class _Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def make_app(predictor: Predictor, *, max_body: int = 16 << 20, max_waiting: int = 256, max_rows: int = 1024, workers: int = 1, watch: float = 0) -> Starlette:
    """The ASGI application. ``max_body``: bytes of a request; ``max_waiting``, ``max_rows``, ``workers``: see ``Batcher``; ``watch``: seconds
    between looks at ``CURRENT``, 0 for none."""
    server = _Server(predictor, max_body, max_waiting, max_rows, workers, watch)
    model, versioned = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"
    routes = [
        Route("/v2", server.about), Route("/v2/health/live", server.live), Route("/v2/health/ready", server.ready), Route("/metrics", server.metrics),
        *(Route(path + end, endpoint, methods=[method]) for path in (model, versioned) for end, endpoint, method in (
            ("", server.model, "GET"), ("/ready", server.model_ready, "GET"), ("/infer", server.infer, "POST"))),
        Route("/v2/repository/models/{model}/load", server.load, methods=["POST"]),
        Route("/v2/repository/models/{model}/rollback", server.rollback, methods=["POST"]),
    ]  # fmt: skip
    return Starlette(routes=routes, lifespan=server.lifespan, exception_handlers={Exception: _failed, _Refused: _failed, TablewrightError: _failed})


def _failed(request: Request, error: Exception) -> Response:
    status, headers = 500, {}
    if isinstance(error, _Refused):
        status = error.status
    elif isinstance(error, (InputError, IdOutOfRange)):
        status = 400
    elif isinstance(error, (StoreUnavailable, Busy)):
        status, headers = 503, {"Retry-After": "1"}
    said = str(error) if isinstance(error, (_Refused, TablewrightError)) else f"{type(error).__name__} in the server; its log has more"
    return JSONResponse({"error": said}, status, headers)


class _Server:
    def __init__(self, predictor: Predictor, max_body: int, max_waiting: int, max_rows: int, workers: int, watch: float) -> None:
        self._predictor, self._max_body, self._watch = predictor, max_body, watch
        self._registry = registry = CollectorRegistry()
        self._answers = Counter("tablewright_requests", "Answered requests by HTTP status", ["status"], registry=registry)
        self._seconds = Histogram("tablewright_request_seconds", "From a parsed request to its answer", registry=registry)
        sizes = Histogram("tablewright_batch_requests", "Requests that ran as one batch", buckets=(1, 2, 4, 8, 16, 32, 64, 128), registry=registry)
        rows = Histogram("tablewright_batch_rows", "Rows of such a batch", buckets=[4**k for k in range(8)], registry=registry)
        self._batcher = Batcher(predictor, max_rows, max_waiting, workers, lambda n, m: (sizes.observe(n), rows.observe(m)))
        Gauge("tablewright_waiting_requests", "Requests not begun", registry=registry).set_function(lambda: self._batcher.waiting)
        self._version = Gauge("tablewright_version", "1 for the version that answers", ["model", "version", "digest"], registry=registry)
        registry.register(_Stats(predictor))  # type: ignore[arg-type]

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette):
        watcher = asyncio.create_task(self._watching()) if self._watch > 0 else None
        yield
        if watcher is not None:
            watcher.cancel()
        await asyncio.to_thread(self._batcher.close)
        self._predictor.close()

    async def _watching(self) -> None:
        while True:
            await asyncio.sleep(self._watch)
            try:
                await asyncio.to_thread(self._predictor.reload)
            except Exception as error:
                _log.error("still version %s: %s", self._predictor.version, error)

    # --- protocol ---------------------------------------------------------------------------------------------------------

    async def about(self, request: Request) -> Response:
        from ... import __version__

        return JSONResponse({"name": "tablewright", "version": __version__, "extensions": ["model_repository"]})

    async def live(self, request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        return JSONResponse({"ready": True})  # the application starts once the model has answered its recorded requests

    async def model_ready(self, request: Request) -> Response:
        version = self._asked(request)
        return JSONResponse({"name": version.manifest.model, "ready": True})

    async def model(self, request: Request) -> Response:
        manifest = self._asked(request).manifest
        tensors = {
            kind: [{"name": d["name"], "datatype": _DATATYPES[d["dtype"]], "shape": [s if type(s) is int else -1 for s in d["shape"]]}
                   for d in manifest.raw[kind]] for kind in ("inputs", "outputs")
        }  # fmt: skip
        return JSONResponse({"name": manifest.model, "versions": [manifest.version], "platform": "tablewright_onnx", **tensors})

    async def infer(self, request: Request) -> Response:
        try:
            response = await self._infer(request)
        except (TablewrightError, _Refused) as error:
            response = _failed(request, error)
        self._answers.labels(str(response.status_code)).inc()
        return response

    async def _infer(self, request: Request) -> Response:
        self._asked(request)
        body = _json(await self._body(request))
        wanted = _names(body)
        inputs: dict[str, np.ndarray] = {}
        for tensor in body["inputs"]:
            name, array = _tensor(tensor)
            if name in inputs:
                raise InputError(f"input '{name}' is given twice")
            inputs[name] = array
        started = time.perf_counter()
        outputs, version = await asyncio.wrap_future(self._batcher.submit(inputs))
        self._seconds.observe(time.perf_counter() - started)
        unknown = [name for name in wanted or () if name not in outputs]
        if unknown:
            raise InputError(f"there is no output '{unknown[0]}'; there are {', '.join(outputs)}")
        answer = {"model_name": version.manifest.model, "model_version": version.manifest.version, "outputs": [
            {"name": name, "datatype": _DATATYPES[value.dtype.name], "shape": list(value.shape), "data": value.reshape(-1).tolist()}
            for name, value in outputs.items() if wanted is None or name in wanted]}  # fmt: skip
        if "id" in body:
            answer["id"] = body["id"]
        return Response(json.dumps(answer), media_type="application/json")  # NaN and infinity as Python writes them

    async def load(self, request: Request) -> Response:
        self._asked(request)
        body = _json(await self._body(request) or b"{}")
        parameters = body.get("parameters") or {}
        name = await asyncio.to_thread(self._predictor.reload, parameters.get("version"))
        return JSONResponse({"name": self._predictor.manifest.model, "version": name})

    async def rollback(self, request: Request) -> Response:
        self._asked(request)
        return JSONResponse({"name": self._predictor.manifest.model, "version": await asyncio.to_thread(self._predictor.rollback)})

    async def metrics(self, request: Request) -> Response:
        manifest = self._predictor.manifest
        self._version.clear()
        self._version.labels(manifest.model, manifest.version, manifest.digest[:12]).set(1)
        return Response(generate_latest(self._registry), media_type="text/plain; version=0.0.4")

    def _asked(self, request: Request) -> Version:
        version = self._predictor._version
        model, name = request.path_params["model"], request.path_params.get("version")
        if model != version.manifest.model:
            raise _Refused(404, f"there is no model '{model}'; this server has '{version.manifest.model}'")
        if name is not None and name != version.manifest.version:
            raise _Refused(404, f"version '{name}' does not answer now; '{version.manifest.version}' does")
        return version

    async def _body(self, request: Request) -> bytes:
        size = request.headers.get("content-length", "0")
        too_long = _Refused(413, f"the request is larger than {self._max_body} bytes")
        if size.isdigit() and int(size) > self._max_body:
            raise too_long
        parts, total = [], 0
        async for part in request.stream():
            total += len(part)
            if total > self._max_body:
                raise too_long
            parts.append(part)
        return b"".join(parts)


class _Stats:
    """What the predictor counts, as Prometheus asks for it."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    def collect(self):
        stats = self._predictor.stats()
        for name, value in stats["store"].items():
            yield CounterMetricFamily(f"tablewright_store_{name}", f"{name} of the row store, since this version was loaded", value=value)
        missing = CounterMetricFamily("tablewright_missing_ids", "Ids that were no row, by table", labels=["table"])
        for table, count in stats["missing_ids"].items():
            missing.add_metric([table], count)
        yield missing


# --- JSON --------------------------------------------------------------------------------------------------------------------


def _json(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise InputError("the body is not a JSON object")
    return body


def _names(body: dict[str, Any]) -> set[str] | None:
    """The outputs that are asked for; ``None``: all."""
    if not isinstance(body.get("inputs"), list):
        raise InputError('the body has no list "inputs"')
    outputs = body.get("outputs")
    if outputs is None:
        return None
    if not isinstance(outputs, list) or not all(isinstance(o, dict) and isinstance(o.get("name"), str) for o in outputs):
        raise InputError('"outputs" must be a list of objects with a "name"')
    return {o["name"] for o in outputs}


def _tensor(tensor: Any) -> tuple[str, np.ndarray]:
    if not isinstance(tensor, dict) or not isinstance(tensor.get("name"), str):
        raise InputError('each of "inputs" must be an object with "name", "shape", "datatype" and "data"')
    name, shape, datatype, data = tensor["name"], *(tensor.get(key) for key in ("shape", "datatype", "data"))
    if datatype not in _NUMPY:
        raise InputError(f"input '{name}' has datatype {datatype!r}; it must be one of {', '.join(_NUMPY)}")
    if not isinstance(shape, list) or not all(type(s) is int and s >= 0 for s in shape):
        raise InputError(f"input '{name}' has shape {shape!r}; it must be a list of sizes")
    if not isinstance(data, list):
        raise InputError(f"input '{name}' has no list \"data\"")
    dtype = np.dtype(_NUMPY[datatype])
    try:
        found = np.array(data) if data else np.empty(0, dtype)
        if found.dtype.kind not in {"f": "fiu", "b": "b"}.get(dtype.kind, "iu"):
            raise ValueError(f"the numbers are {found.dtype}")
        if dtype.kind in "iu" and found.size and not (np.iinfo(dtype).min <= int(found.min()) and int(found.max()) <= np.iinfo(dtype).max):
            raise ValueError(f"some number is too large for {datatype}")
        array = found.astype(dtype)
        return name, array.reshape(shape)
    except (ValueError, OverflowError) as error:
        raise InputError(f"input '{name}' is not {datatype} of shape {shape}: {error}") from None


