"""The commands of serving: ``serve``, ``serve-shards`` and ``publish``. They need no torch."""
from __future__ import annotations

import argparse
import re
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from ..errors import TablewrightError

NAMES = ("serve", "serve-shards", "publish")


def add_commands(commands) -> None:
    """Add them to the command line."""
    serve = commands.add_parser("serve", help="answer requests to an exported model over HTTP (Open Inference Protocol), with /metrics")
    serve.add_argument("directory", help="the model's directory (its CURRENT is followed), or one version's")
    serve.add_argument("--store", default="local", help='"local", "flight://host:port,..." or "redis-cluster://host:port,..."')
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1; there is no encryption and no login)")
    serve.add_argument("--port", type=int, default=8080, help="default 8080")
    serve.add_argument("--deadline-ms", type=float, default=50, help="for all rows of a batch, of a remote store (default 50)")
    serve.add_argument("--cache-rows", type=int, default=0, help="rows to keep here in front of a remote store")
    serve.add_argument("--threads", type=int, default=1, help="of ONNX Runtime, a batch (default 1)")
    serve.add_argument("--workers", type=int, default=1, help="batches at a time (default 1)")
    serve.add_argument("--max-rows", type=int, default=1024, help="of concurrent requests in one batch (default 1024)")
    serve.add_argument("--max-waiting", type=int, default=256, help="requests; further ones get 503 (default 256)")
    serve.add_argument("--max-body", type=int, default=16 << 20, help="bytes of a request; larger ones get 413 (default 16 MiB)")
    serve.add_argument("--watch", type=float, default=0, metavar="SECONDS", help="look at CURRENT so often and reload (default: never)")
    serve.add_argument("--verify", choices=("full", "size"), default="full", help="check checksums, or sizes only")
    serve.set_defaults(run=_serve)
    shards = commands.add_parser("serve-shards", help="serve rows of exported models to other processes, over Arrow Flight")
    shards.add_argument("directory", help="the model's directory, with its versions")
    shards.add_argument("--port", type=int, default=7200, help="0: a free one, which is printed (default 7200)")
    shards.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1; there is no encryption and no login)")
    shards.add_argument("--row-port", type=int, default=0, help="plain TCP for the rows; clients learn it over Flight and use Flight where they cannot reach it "
                        "(default 0: a free one; -1: none)")  # fmt: skip
    shards.add_argument("--part", type=_part, default=(0, 1), metavar="I/N", help="which part of the rows, of how many (default 0/1: all)")
    shards.add_argument("--verify", choices=("full", "size"), default="full", help="check checksums, or sizes only")
    shards.set_defaults(run=_serve_shards)
    publish = commands.add_parser("publish", help="write a version's rows to a Redis Cluster")
    publish.add_argument("directory", help="the model's directory (its current version), or one version's")
    publish.add_argument("address", metavar="redis-cluster://HOST:PORT,...")
    publish.add_argument("--retire", metavar="VERSION", help="take this version of the model out of the cluster afterwards")
    publish.set_defaults(run=_publish)


def main(argv: Sequence[str]) -> int:
    """Run one of them; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tablewright")
    add_commands(parser.add_subparsers(dest="command", required=True))
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (TablewrightError, ImportError, OSError) as error:
        print(f"tablewright {args.command}: {error}", file=sys.stderr)
        return 2


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not int(found[1]) < int(found[2]):
        raise argparse.ArgumentTypeError(f"'{text}' is not I/N with I from 0 to N - 1")
    return int(found[1]), int(found[2])


def _serve(args: argparse.Namespace) -> int:
    import uvicorn

    from .http_server import make_app
    from .predictor import load_serving

    predictor = load_serving(
        args.directory, args.store, deadline_ms=args.deadline_ms, cache_rows=args.cache_rows, threads=args.threads, verify=args.verify
    )  # fmt: skip
    app = make_app(
        predictor, max_body=args.max_body, max_waiting=args.max_waiting, max_rows=args.max_rows, workers=args.workers, watch=args.watch
    )  # fmt: skip
    print(f"model {predictor.manifest.model} {predictor.version} on http://{args.host}:{args.port}/v2", flush=True)
    # a connection is a request at most: as many as may wait or run, and some for health and metrics
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning", access_log=False, limit_concurrency=args.max_waiting + args.workers + 64)
    return 0


def _serve_shards(args: argparse.Namespace) -> int:
    from . import manifest as manifests
    from .shard_server import ShardServer

    home = Path(args.directory)
    if (home / manifests.NAME).is_file():
        home = home.parent  # a version's directory: serve it and its siblings
    server = ShardServer(home, args.part, args.host, args.port, args.verify, args.row_port if args.row_port >= 0 else None)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
    print(f"part {args.part[0]} of {args.part[1]} of {home} on {args.host}:{server.port}", flush=True)
    server.serve()
    return 0


def _publish(args: argparse.Namespace) -> int:
    from ...kernels.gather.local import LocalStore
    from ...kernels.gather.redis_rows import publish, retire
    from . import manifest as manifests
    from .stores import published

    kind, _, address = args.address.partition("://")
    if kind != "redis-cluster" or not address:
        print(f"tablewright publish: '{args.address}' is not redis-cluster://host:port,...", file=sys.stderr)
        return 2
    manifest = manifests.read(args.directory)
    manifest.verify("full")
    count = publish(published(manifest), LocalStore(manifest.tables, manifest.root, manifest.base), address)
    print(f"{count} rows of {manifest.model} {manifest.version} ({manifest.digest[:12]}) are in {args.address}")
    if args.retire:
        retire(published(manifests.read(manifest.root.parent / args.retire)), address)
        print(f"version {args.retire} was taken out")
    return 0
