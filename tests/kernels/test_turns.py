"""Turns: at most so many threads at once, the others in the order they came; a turn that is left goes to another thread."""
from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tablewright.kernels.gather import turns
from tablewright.kernels.gather.row_socket import ANSWER, MAGIC, REQUEST, RowSocket, fill
from tablewright.kernels.gather.turns import Turns

LONG = 30


def _until(true) -> None:
    end = time.monotonic() + LONG
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_no_more_than_most_work_at_once_and_all_get_their_turn():
    most, now, peak, lock = Turns(3), [0], [0], threading.Lock()

    def work(_):
        with most:
            with lock:
                now[0] += 1
                peak[0] = max(peak[0], now[0])
            time.sleep(0.001)
            with lock:
                now[0] -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(100)))
    assert peak == [3] and most._free == 3 and not most._waiting


def test_turns_go_in_the_order_of_arrival():
    one, order, threads = Turns(1), [], []
    with one:
        for k in range(6):
            def work(k=k):
                with one:
                    order.append(k)

            threads.append(threading.Thread(target=work))
            threads[-1].start()
            _until(lambda k=k: len(one._waiting) == k + 1)
    for thread in threads:
        thread.join(LONG)
    assert order == list(range(6)) and one._free == 1


def test_who_left_comes_back_before_those_that_have_not_begun():
    one, order, gone, go = Turns(1), [], threading.Event(), threading.Event()

    def first():
        with one:
            turns.leave()
            gone.set()
            go.wait(LONG)
            turns.back()
            order.append("first")

    def other():
        with one:
            order.append("other")

    began = threading.Thread(target=first)
    began.start()
    assert gone.wait(LONG)
    with one:  # the turn that was left
        waits = threading.Thread(target=other)
        waits.start()
        _until(lambda: len(one._waiting) == 1)
        go.set()
        _until(lambda: len(one._waiting) == 2)
    began.join(LONG), waits.join(LONG)
    assert order == ["first", "other"] and one._free == 1


@pytest.mark.parametrize("left", [False, True])
def test_an_error_gives_the_turn_on_once(left):
    one = Turns(1)
    with pytest.raises(ZeroDivisionError), one:
        if left:
            turns.leave()
            turns.leave()
        raise ZeroDivisionError
    turns.back()  # of a turn that is over: nothing
    assert one._free == 1
    with one:
        assert one._free == 0


def test_an_interrupted_wait_takes_no_turn(monkeypatch):
    one = Turns(1)

    class Interrupted:
        def __init__(self):
            self.held = False

        def acquire(self):
            if self.held:
                raise KeyboardInterrupt
            self.held = True

    with one:
        monkeypatch.setattr(turns.threading, "Lock", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            one._take(first=False)
        monkeypatch.undo()
        assert not one._waiting
    assert one._free == 1


def test_a_row_port_that_does_not_answer_holds_no_turn():
    import socket

    one, rows = Turns(1), np.arange(8, dtype=np.float32)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        link = RowSocket("127.0.0.1", listener.getsockname()[1], LONG, patience=0.005)
        server, out = listener.accept()[0], np.zeros(8, np.float32)

        def ask():
            with one:
                link.send(b"")
                link.receive([out])
                turns.back()

        asks = threading.Thread(target=ask)
        asks.start()
        fill(server, [memoryview(bytearray(REQUEST.size))])  # it was asked, under the turn
        _until(lambda: one._free == 1)
        with one:
            server.sendall(ANSWER.pack(MAGIC, 0, rows.nbytes, b"d") + rows.tobytes())
            _until(lambda: len(one._waiting) == 1)
        asks.join(LONG)
        server.close()
    assert np.array_equal(out, rows) and one._free == 1
