"""Rows over a shard server's row port: the same rows and errors as over Flight, Flight where it cannot be reached, and whatever else may call there."""
from __future__ import annotations

import contextlib
import json
import mmap
import re
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from serving_models import exported
from serving_nodes import free_port
from tablewright.kernels.gather import flight as flight_rows
from tablewright.kernels.gather import turns
from tablewright.kernels.gather.flight import ERROR, FlightStore, ticket
from tablewright.kernels.gather.row_socket import ANSWER, MAGIC, REQUEST, RowError, RowSocket
from tablewright.kernels.gather.unique import Unique
from tablewright.rewriter.serving import manifest as manifests
from tablewright.rewriter.serving import row_port as ports
from tablewright.rewriter.serving.shard_server import ShardServer
from tablewright.rewriter.serving.stores import open_store


@contextlib.contextmanager
def _server(row_port: int | None = 0):
    server = ShardServer(exported(3)[1], row_port=row_port)
    try:
        yield server
    finally:
        server.shutdown()


def _store(server, sockets=True) -> Unique:
    manifest = manifests.read(exported(3)[1])
    return Unique(FlightStore(f"127.0.0.1:{server.port}", manifest.tables, manifest.digest, 30, sockets), manifest.tables)


def _rows_are_right(store) -> bool:
    manifest = manifests.read(exported(3)[1])
    asked = [(name, np.arange(t.rows)[::-1]) for name, t in manifest.tables.items()]
    wanted = open_store(manifest).lookup_many(asked)
    return all(np.array_equal(a, b) for a, b in zip(store.lookup_many(asked), wanted))


def _closed(server) -> None:
    server._row_port.end()


@pytest.mark.parametrize("row_port, spoil, sockets, over", [
    (0, None, True, 1), (0, None, False, 0), (None, None, True, 0), (0, _closed, True, 0),
], ids=["row port", "not wanted", "none offered", "cannot be reached"])  # fmt: skip
def test_rows_come_over_the_row_port_where_there_is_one(row_port, spoil, sockets, over):
    with _server(row_port) as server:
        if spoil is not None:
            spoil(server)
        store = _store(server, sockets)
        assert _rows_are_right(store) and _rows_are_right(store)
        assert store.stats()["requests"] == 2 and store.stats()["over_row_ports"] == 2 * over
        store.close()


def test_a_server_that_comes_back_with_another_row_port_is_found():
    with _server() as server:
        store = _store(server)
        assert _rows_are_right(store)
        other = _another_row_port(server)
        for connection in list(store.store._idle[0, 0]):
            connection.drop()  # as the end of the old process does
        assert _rows_are_right(store) and store.store._row_ports == [[other]]
        assert store.stats()["over_row_ports"] == 2
        store.close()


@pytest.mark.parametrize("sockets", [True, False], ids=["row port", "Flight"])
def test_a_node_that_cannot_read_its_rows_leaves_the_request_to_its_replica(sockets):
    with _server() as broken, _server() as whole:
        manifest = manifests.read(exported(3)[1])
        store = Unique(FlightStore(f"127.0.0.1:{broken.port}|127.0.0.1:{whole.port}", manifest.tables, manifest.digest, 30, sockets), manifest.tables)
        store.store._preferred = [0]
        assert _rows_are_right(store) and store.stats()["failovers"] == 0
        for _, opened in broken._open.values():
            opened.lookup_many = _no_disk
        assert _rows_are_right(store) and store.stats()["failovers"] == 1
        store.close()


def _no_disk(*_):
    raise OSError(5, "Input/output error")


def test_a_host_in_brackets_and_more_rows_than_a_connection_keeps_memory_for(monkeypatch):
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    monkeypatch.setattr(ports, "_MOST_KEPT", 10)
    server, manifest = ShardServer(exported(3)[1], host="[::1]"), manifests.read(exported(3)[1])
    try:
        store = Unique(FlightStore(f"[::1]:{server.port}", manifest.tables, manifest.digest, 30), manifest.tables)
        assert _rows_are_right(store) and store.stats()["over_row_ports"] == 1
        store.close()
    finally:
        server.shutdown()


def _another_row_port(server) -> int:
    """Give ``server`` another row port and return it."""
    old, kind = server._row_port, type(server._row_port)
    old.end()
    server._row_port = kind("127.0.0.1", 0, old.rows, old.told)
    return server._row_port.port


def _ask(link: socket.socket, raw: bytes) -> tuple[int, bytes]:
    link.sendall(REQUEST.pack(MAGIC, 0, len(raw)) + raw)
    head = _exactly(link, ANSWER.size)
    _, status, size, _ = ANSWER.unpack(head)
    return status, _exactly(link, size)


def _exactly(link: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        more = link.recv(size - len(found))
        assert more, "the connection ended"
        found += more
    return found


def test_a_refused_request_is_named_and_the_connection_goes_on():
    manifest = manifests.read(exported(3)[1])
    name, table = next(iter(manifest.tables.items()))
    good = ticket(manifest.digest, [(name, np.arange(3))])
    with _server() as server, socket.create_connection(("127.0.0.1", server._row_port.port), 30) as link:
        for raw, said in [
            (ticket(manifest.digest, [(name, np.array([table.rows]))]), "IdOutOfRange:.*'" + name),
            (ticket(manifest.digest, [(name, np.array([-1]))]), "IdOutOfRange:"),
            (ticket(manifest.digest, [("nothing", np.array([0]))]), "UnknownTable:.*'nothing'"),
            (ticket("0" * 64, [(name, np.array([0]))]), "VersionSkew:"),
            (good[:-8], "InputError:a ticket of"),
            (b"", "InputError:"),
            (b"\xff" * 12, "InputError:"),
        ]:
            status, text = _ask(link, raw)
            assert status == 1
            assert re.search(ERROR + said, text.decode()), text
        status, rows = _ask(link, good)
        assert status == 0 and rows == open_store(manifest).lookup_many([(name, np.arange(3))])[0].tobytes()


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\nHost: here\r\n\r\n", REQUEST.pack(MAGIC, 0, 1 << 40), REQUEST.pack(MAGIC, 0, 100) + b"half", b""])
def test_whatever_else_calls_there_does_no_harm(sent):
    with _server() as server:
        with socket.create_connection(("127.0.0.1", server._row_port.port), 30) as link:
            link.sendall(sent)
            if len(sent) > 4 and not sent.endswith(b"half"):
                status, text = ANSWER.unpack(_exactly(link, ANSWER.size))[1], link.recv(1000)
                assert status == 1 and b"a request begins with" in text
        store = _store(server)
        assert _rows_are_right(store) and store.stats()["over_row_ports"] == 1
        store.close()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells how much memory a process has")
def test_a_request_that_is_only_announced_takes_no_memory():
    def held():
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    with _server() as server, contextlib.ExitStack() as stack:
        before, threads = held(), threading.active_count()
        for _ in range(8):
            link = stack.enter_context(socket.create_connection(("127.0.0.1", server._row_port.port), 30))
            link.sendall(REQUEST.pack(MAGIC, 0, 64 << 20) + b"some")
        while threading.active_count() < threads + 8:
            time.sleep(0.01)
        time.sleep(0.3)
        assert held() - before < 256 << 20  # of 512


# --- what answers ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _answering(*parts: bytes, pause: float = 0.0):
    """A port where the first connection is answered with ``parts``, and then left open until the end of the test."""
    over = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def run():
        link, _ = listener.accept()
        with link:
            link.recv(REQUEST.size)
            for part in parts:
                link.sendall(part)
                time.sleep(pause)
            if parts and parts[-1] == b"":
                over.wait(60)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        over.set()
        thread.join(60)
        listener.close()


def _answer(rows: bytes, digest=b"d" * 64, status=0) -> bytes:
    return ANSWER.pack(MAGIC, status, len(rows), digest) + rows


def _received(port: int, sizes=(3, 5)) -> tuple[tuple[str, int], list[np.ndarray]]:
    link, pieces = RowSocket("127.0.0.1", port, 30), [np.zeros((n, 2), np.float32) for n in sizes]
    link.send(b"")
    return link.receive(pieces), pieces


@pytest.mark.parametrize("sockets, here, spoil, left", [
    (True, True, None, False), (True, False, None, True), (False, True, None, True), (True, True, _closed, True),
], ids=["this machine", "another", "Flight", "its port cannot be reached"])  # fmt: skip
def test_who_waits_for_another_machine_leaves_its_turn(monkeypatch, sockets, here, spoil, left):
    seen, answer = [], flight_rows._Call.answer

    def noted(call):
        seen.append(turns._thread.left)
        answer(call)

    with _server() as server:
        monkeypatch.setattr(flight_rows, "_here", lambda replica: here)
        if spoil is not None:
            spoil(server)
        store, one = _store(server, sockets), turns.Turns(1)
        monkeypatch.setattr(flight_rows._Call, "answer", noted)
        monkeypatch.setattr(flight_rows, "_PATIENCE", 0)
        with contextlib.closing(store), one:  # a server does not end before its streams
            assert _rows_are_right(store) and not turns._thread.left and one._free == 0
        assert seen == [left] and one._free == 1


@pytest.mark.parametrize("replica, here", [("127.0.0.1:1", True), ("[::1]:1", True), ("localhost:1", True), ("10.0.0.1:1", False), ("a.b:1", False)])
def test_what_is_on_this_machine(replica, here):
    assert flight_rows._here(replica) == here


def test_an_answer_in_small_parts_is_put_together():
    rows = np.arange(16, dtype=np.float32).reshape(8, 2)
    whole = _answer(rows.tobytes())
    with _answering(*[whole[i : i + 7] for i in range(0, len(whole), 7)], pause=0.001) as port:
        (digest, size), pieces = _received(port)
    assert digest == "d" * 64 and size == rows.nbytes and np.array_equal(np.concatenate(pieces), rows)


def test_an_answer_of_another_size_is_told_and_writes_nothing():
    with _answering(_answer(bytes(range(40)))) as port:
        (_, size), pieces = _received(port)
    assert size == 40 and not any(each.any() for each in pieces)


@pytest.mark.parametrize("parts, error, said", [
    ((_answer(b"tablewright-error:VersionSkew:none here", b"", 1),), RowError, "VersionSkew:none here"),
    ((b"HTTP/1.1 400 Bad Request" + bytes(100),), ConnectionError, "not a row port"),
    ((_answer(bytes(64))[:100],), ConnectionResetError, "ended"),
    ((), ConnectionResetError, "ended"),
])  # fmt: skip
def test_answers_that_are_none_are_errors(parts, error, said):
    with _answering(*parts) as port, pytest.raises(error, match=said):
        _received(port)


def test_a_read_that_waits_is_ended_from_another_thread():
    with _answering(_answer(bytes(64))[:100], b"") as port:
        link = RowSocket("127.0.0.1", port, 30)
        link.send(b"")
        threading.Timer(0.2, link.drop).start()
        with pytest.raises(OSError):
            link.receive([np.zeros((8, 2), np.float32)])


def test_a_server_that_does_not_start_leaves_no_row_port_open():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        row_port = free_port()
        with pytest.raises(Exception, match="(?i)server|address|bind"):
            ShardServer(exported(3)[1], port=taken.getsockname()[1], row_port=row_port)
    socket.create_server(("127.0.0.1", row_port)).close()


def test_the_port_is_said_in_describe():
    from pyarrow import flight

    with _server() as server:
        client = flight.FlightClient(f"grpc://127.0.0.1:{server.port}")
        said = json.loads(next(iter(client.do_action("describe"))).body.to_pybytes())
        assert said["row_port"] == server._row_port.port and said["part"] == [0, 1]
        client.close()
