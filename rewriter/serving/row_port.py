"""The row port of a shard server: the requests of Flight's exchange, over plain TCP (``docs/row_protocol.md``). No torch."""
from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Callable

import numpy as np

from ...kernels.gather.row_socket import ANSWER, MAGIC, MOST_TEXT, REQUEST, fill, send

_MOST_REQUEST = 64 << 20  # bytes of a ticket: eight million ids
_MOST_KEPT = 16 << 20  # bytes of rows for which a connection keeps memory
_ANSWER_SECONDS = 60  # a client that takes nothing for so long is gone


class RowPort(socketserver.ThreadingTCPServer):
    """Answers on ``host:port`` (0: a free one, in ``.port``) from when it is made until :meth:`end`, with a thread for each connection.

    ``rows(ticket, room)`` gives the digest and the bytes of the rows; ``room(n)`` is memory for them. What it raises is told as
    ``told(error)`` says, and the connection stays. A host of IPv6 may stand in brackets, as in Flight's addresses."""

    allow_reuse_address, daemon_threads, block_on_close, request_queue_size = True, True, False, 128

    def __init__(self, host: str, port: int, rows: Callable, told: Callable[[Exception], Exception]) -> None:
        host = host.strip("[]")
        self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        self.rows, self.told = rows, told
        super().__init__((host, port), _Connection)
        self.port = self.server_address[1]
        threading.Thread(target=self.serve_forever, args=(0.1,), daemon=True, name="tablewright-row-port").start()

    def handle_error(self, request, client_address) -> None:
        """A client that goes away, or speaks something else, is its own affair."""

    def end(self) -> None:
        """Take no more connections."""
        self.shutdown()
        self.server_close()


class _Connection(socketserver.BaseRequestHandler):
    server: RowPort
    request: socket.socket

    def setup(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _ANSWER_SECONDS.to_bytes(8, "little") + bytes(8))
        self._kept = np.empty(1 << 16, np.uint8)

    def _room(self, size: int) -> np.ndarray:
        """Used again for the next request: what is sent was copied by the kernel."""
        if size > _MOST_KEPT:
            return np.empty(size, np.uint8)
        if len(self._kept) < size:
            self._kept = np.empty(size, np.uint8)
        return self._kept[:size]

    def handle(self) -> None:
        head = memoryview(bytearray(REQUEST.size))
        while True:
            fill(self.request, [head])
            magic, _, size = REQUEST.unpack(head)
            if magic != MAGIC or size > _MOST_REQUEST:
                wrong = ValueError(f"a request begins with {bytes(magic)!r} and has {size} bytes; it begins with {MAGIC!r} and has {_MOST_REQUEST} at most")
                self._refuse(wrong)
                return
            ticket = memoryview(np.empty(size, np.uint8))  # takes memory as its bytes come, not as they are announced
            if size:
                fill(self.request, [ticket])
            try:
                digest, rows = self.server.rows(ticket, self._room)
            except Exception as error:
                self._refuse(error)
            else:
                send(self.request, ANSWER.pack(MAGIC, 0, len(rows), digest.encode()), rows)

    def _refuse(self, error: Exception) -> None:
        text = str(self.server.told(error)).encode()[:MOST_TEXT]
        send(self.request, ANSWER.pack(MAGIC, 1, len(text), b""), text)
