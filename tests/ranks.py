"""Real processes over gloo for tests: one pool for each world size, many cases in it (starting a process takes seconds)."""
from __future__ import annotations

import datetime
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

TIMEOUT = 60.0  # seconds: of the process group, and so of a collective that a rank does not join


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def join_ranks(rank: int, world: int, port: int, timeout: float = TIMEOUT):
    """Initialise gloo and return the mesh of all ranks."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=timeout)
    store = dist.TCPStore("127.0.0.1", port, world, rank == 0, timeout=limit)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
    return init_device_mesh("cpu", (world,))


def _serve(rank: int, world: int, port: int, pipe: Any, timeout: float) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    mesh = join_ranks(rank, world, port, timeout)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(rank, world, mesh, *args)))
        except BaseException as error:
            pipe.send((False, (type(error).__name__, str(error), traceback.format_exc())))


class Pool:
    """``world`` processes. ``run(function, *args)`` calls ``function(rank, world, mesh, *args)`` in each."""

    def __init__(self, world: int, timeout: float = TIMEOUT) -> None:
        context = multiprocessing.get_context("spawn")
        self.world, self.timeout, port = world, timeout, free_port()
        pipes = [context.Pipe() for _ in range(world)]
        self.pipes = [mine for mine, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(rank, world, port, theirs, timeout), daemon=True) for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()

    def outcomes(self, function: Callable, *args: Any, wait: float = 120.0, heard: int | None = None) -> list[tuple[bool, Any]]:
        """For each rank (True, what the function returned) or (False, (error type, message, traceback)); a rank that has died, or
        said nothing for ``wait`` seconds, has (False, ("", why, "")). ``heard``: only the first so many ranks are asked."""
        for pipe in self.pipes:
            try:
                pipe.send((function, args))
            except OSError:
                pass
        found = []
        for pipe in self.pipes[:heard]:
            try:
                found.append(pipe.recv() if pipe.poll(wait) else (False, ("", f"nothing for {wait} s", "")))
            except (EOFError, OSError):
                found.append((False, ("", "died", "")))
        return found

    def run(self, function: Callable, *args: Any) -> list[Any]:
        """What each rank returned. Raises AssertionError with the first rank's traceback."""
        outcomes = self.outcomes(function, *args, wait=2 * self.timeout)
        failed = [(rank, value) for rank, (ok, value) in enumerate(outcomes) if not ok]
        # the rank that failed by itself first, before those that only lost it
        failed.sort(key=lambda item: item[1][0] == "PeerError")
        if failed:
            self.close()
            rank, (_, message, trace) = failed[0]
            raise AssertionError(f"rank {rank} of {self.world}, {len(failed)} failed: {trace or message}")
        return [value for _, value in outcomes]

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(0.2)
            if process.is_alive():
                process.kill()
                process.join(5)


class Pools:
    """A pool for each world size, made when it is first asked for, and made again where a case broke it."""

    def __init__(self, timeout: float = TIMEOUT) -> None:
        self.held: dict[int, Pool] = {}
        self.timeout = timeout

    def __call__(self, world: int) -> Pool:
        pool = self.held.get(world)
        if pool is None or not pool.alive:
            if pool is not None:
                pool.close()
            pool = self.held[world] = Pool(world, self.timeout)
        return pool

    def close(self) -> None:
        for pool in self.held.values():
            pool.close()
