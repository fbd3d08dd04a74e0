"""Rows over a plain TCP connection to a shard server, which says its port over Arrow Flight. No torch, no pyarrow.

What this saves over Flight's own exchange is threads: a call of gRPC passes through two or three on each side, and one empty call to each of
three servers takes longer (0.7 ms) than all rows of a request over sockets (``benchmarks/results``). The frames are written down in
``docs/row_protocol.md``.
"""
from __future__ import annotations

import socket
import struct
from collections.abc import Sequence

import numpy as np

from . import turns

MAGIC = b"TWR1"
REQUEST = struct.Struct("<4sIQ")  # magic, 0, bytes of the ticket that follows
ANSWER = struct.Struct("<4sIQ64s")  # magic, 0 or 1 for an error, bytes that follow (rows, or the error's text), digest
MOST_TEXT = 1 << 16  # bytes of an error
_TIME = struct.Struct("@ll")  # seconds, microseconds


class RowError(Exception):
    """The server's own words of what is wrong with a request."""


def fill(link: socket.socket, views: list[memoryview]) -> None:
    """Read until all ``views`` (of bytes, none empty) are full. Raises ``ConnectionError`` at an end before that. Where the socket's patience is
    over first, this thread's turn is left to another one."""
    at = 0
    while at < len(views):
        try:
            got = link.recvmsg_into(views[at : at + 512], 0, socket.MSG_WAITALL)[0]
        except BlockingIOError:
            turns.leave()
            continue
        if not got:
            raise ConnectionResetError("the connection ended")
        while got:
            size = len(views[at])
            if got < size:
                views[at] = views[at][got:]
                break
            got, at = got - size, at + 1


def send(link: socket.socket, head: bytes, body) -> None:
    """``head`` and ``body`` (anything of bytes) as one message."""
    done = link.sendmsg([head, body])
    if done < len(head):
        link.sendall(head[done:])
        done = len(head)
    left = memoryview(body)[done - len(head) :]
    if len(left):
        link.sendall(left)


class RowSocket:
    """A connection to a replica's row port: a request and its answer at a time. ``seconds``: to connect; ``patience``: seconds without a byte
    after which whoever waits leaves its turn (0: never). Raises ``OSError``."""

    def __init__(self, host: str, port: int, seconds: float, patience: float = 0) -> None:
        self.fresh = True
        self._link = socket.create_connection((host, port), seconds)
        self._link.settimeout(None)  # whoever waits for too long is ended by drop(), from another thread
        self._link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIME.pack(0, int(patience * 1e6)))
        self._head = memoryview(bytearray(ANSWER.size))

    def send(self, raw: bytes) -> None:
        """Ask for what the ticket ``raw`` names."""
        send(self._link, REQUEST.pack(MAGIC, 0, len(raw)), raw)

    def receive(self, pieces: Sequence[np.ndarray]) -> tuple[str, int]:
        """The rows of an answer, into ``pieces`` (C-contiguous, none empty) one after the other. Returns the digest that they are of and how many bytes
        came; where that is not the size of ``pieces``, nothing was written and the connection is of no more use. Raises :class:`RowError`."""
        fill(self._link, [self._head])
        magic, status, size, digest = ANSWER.unpack(self._head)
        if magic != MAGIC:
            raise ConnectionError(f"what answers is not a row port: it begins with {bytes(magic)!r}")
        if status:
            text = bytearray(min(size, MOST_TEXT))
            if text:
                fill(self._link, [memoryview(text)])
            raise RowError(text.decode(errors="replace"))
        if size == sum(each.nbytes for each in pieces):
            fill(self._link, [memoryview(each.view(np.uint8).reshape(-1)) for each in pieces])
        return digest.rstrip(b"\0").decode(), size

    def drop(self) -> None:
        """End it; who reads from it gets an error."""
        try:
            self._link.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it has ended already
    def __del__(self) -> None:
        if hasattr(self, "_link"):
            self._link.close()  # nobody reads from it any more
