"""Real processes for the serving tests: shard servers and a Redis Cluster on free ports of this machine, ended by their own pid."""
from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from serving_models import ROOT

PYTHON = [sys.executable]


@functools.cache
def package_path() -> str:
    """A folder from which this checkout is imported as ``tablewright``."""
    folder = Path(tempfile.mkdtemp(prefix="tablewright-path-"))
    (folder / "tablewright").symlink_to(ROOT)
    return str(folder)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Process:
    """A child with a port; ``stop``/``go`` are SIGSTOP and SIGCONT, ``kill`` is SIGKILL."""

    def __init__(self, command: list[str], port: int | None, ready: str | None = None) -> None:
        env = {**os.environ, "PYTHONPATH": package_path(), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.command, self.port = command, port
        self.child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd="/")
        self.said = []
        while ready is not None:
            line = self.child.stdout.readline()
            self.said.append(line)
            if ready in line:
                if port == 0:
                    self.port = int(line.strip().rsplit(":", 1)[1].split()[0])
                break
            assert line, f"{command} ended: {''.join(self.said)}"

    def signal(self, number: int) -> None:
        os.kill(self.child.pid, number)

    def stop(self) -> None:
        self.signal(signal.SIGSTOP)

    def go(self) -> None:
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        self.child.kill()
        self.child.wait()

    def end(self) -> None:
        if self.child.poll() is None:
            self.child.kill()
            self.child.wait()
        self.child.stdout.close()


@contextlib.contextmanager
def shard_servers(home: Path, parts: int, replicas: int = 1, row_port: int = 0):
    """Processes ``[part][replica]`` that serve ``home``; ``row_port=-1``: by Flight alone."""
    nodes: list[list[Process]] = []
    try:
        for part in range(parts):
            nodes.append([shard_server(home, part, parts, row_port=row_port) for _ in range(replicas)])
        yield nodes
    finally:
        for node in nodes:
            for each in node:
                each.end()


def shard_server(home: Path, part: int, parts: int, port: int = 0, row_port: int = 0) -> Process:
    command = [*PYTHON, "-m", "tablewright", "serve-shards", str(home), "--port", str(port), "--part", f"{part}/{parts}",
               "--row-port", str(row_port)]  # fmt: skip
    return Process(command, port, f"part {part} of {parts}")


def address(nodes: list[list[Process]]) -> str:
    return "flight://" + ",".join("|".join(f"127.0.0.1:{each.port}" for each in node) for node in nodes)


class Redis:
    """A cluster of three masters in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ports = folder, []
        while len(self.ports) < 3:
            port = free_port()
            if port < 55000 and port not in self.ports:  # the cluster bus is 10,000 above
                self.ports.append(port)
        self.nodes = [self.start(port) for port in self.ports]
        hosts = [f"127.0.0.1:{port}" for port in self.ports]
        subprocess.run(["redis-cli", "--cluster", "create", *hosts, "--cluster-yes"], check=True, capture_output=True, timeout=30)
        end = time.monotonic() + 20
        while not all("cluster_state:ok" in self.cli(port, "cluster", "info") for port in self.ports):
            assert time.monotonic() < end
            time.sleep(0.1)

    def start(self, port: int) -> Process:
        home = self.folder / str(port)
        home.mkdir(parents=True, exist_ok=True)
        return Process(["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--cluster-enabled", "yes", "--dir", str(home), "--save", "",
                        "--cluster-node-timeout", "60000", "--appendonly", "no"], port, "Ready to accept connections")  # fmt: skip

    def cli(self, port: int, *command: str) -> str:
        return subprocess.run(["redis-cli", "-p", str(port), *command], capture_output=True, text=True, timeout=10).stdout

    @property
    def address(self) -> str:
        return "redis-cluster://" + ",".join(f"127.0.0.1:{port}" for port in self.ports)

    def end(self) -> None:
        for node in self.nodes:
            node.end()


@pytest.fixture(scope="module")
def redis_cluster(tmp_path_factory):
    if not shutil.which("redis-server") or not shutil.which("redis-cli"):
        pytest.skip("redis-server and redis-cli are not installed: apt-get install redis-server")
    cluster = Redis(tmp_path_factory.mktemp("redis"))
    yield cluster
    cluster.end()


def eventually(check, seconds: float = 20) -> None:
    """``check()`` is true before long."""
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, check
        time.sleep(0.02)
