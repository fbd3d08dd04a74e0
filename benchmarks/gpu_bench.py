"""What ``gpu.py`` times ops with: rates of the machine, medians, floors, the table."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass
class Op:
    """One thing to time. ``bytes`` and ``flops`` make its floor, unless ``floor`` (a function to be timed) is it. ``others``: name -> function."""

    name: str
    shape: str
    run: Callable[[], object]
    bytes: float = 0.0
    flops: float = 0.0
    floor: Callable[[], object] | None = None
    eager: Callable[[], object] | None = None
    compiled: bool = True
    others: dict[str, Callable[[], object]] = field(default_factory=dict)


class Bench:
    """Times ops and keeps the table."""

    def __init__(self, tiny: bool) -> None:
        self.tiny, self.device = tiny, torch.device("cpu" if tiny else "cuda")
        self.rows: list[str] = []
        self.notes: list[str] = []
        self.copy_rate, self.flop_rate = self._rates()

    def seconds(self, function: Callable[[], object]) -> float:
        """The median time of one call."""
        if self.tiny:
            started = time.perf_counter()
            function()
            return time.perf_counter() - started
        from triton.testing import do_bench

        return do_bench(function, warmup=20, rep=80, return_mode="median") / 1e3

    def _rates(self) -> tuple[float, float]:
        count, side = (1 << 16, 64) if self.tiny else (1 << 30, 8192)
        source = torch.zeros(count, dtype=torch.float32, device=self.device)
        target = torch.empty_like(source)
        copied = self.seconds(lambda: target.copy_(source))
        a, b = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        multiplied = self.seconds(lambda: a @ b)
        return 8 * count / copied, 2 * side**3 / multiplied

    def attempt(self, what: str, function: Callable[[], object] | None) -> float | None:
        """The time of ``function``, or None and a note."""
        if function is None:
            return None
        try:
            return self.seconds(function)
        except Exception as error:
            self.note(f"{what}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            return None

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(f"  note: {text}", flush=True)

    def add(self, op: Op) -> None:
        """Time ``op`` and print its row."""
        what = f"{op.name} {op.shape}"
        taken = self.attempt(what, op.run)
        if taken is None:
            return
        floor = self.attempt(f"{what}, floor", op.floor) if op.floor else max(op.bytes / self.copy_rate, op.flops / self.flop_rate)
        compiled = torch.compile(op.eager) if op.eager is not None and op.compiled and not self.tiny else None
        times = {"eager": self.attempt(f"{what}, eager", op.eager), "compile": self.attempt(f"{what}, torch.compile", compiled)}
        times |= {name: self.attempt(f"{what}, {name}", function) for name, function in op.others.items()}
        rate = f"{op.bytes / taken / 1e9:,.0f}" if op.bytes else ""
        beside = [f"{ms(times.pop(n))}" for n in ("eager", "compile")]
        rest = "; ".join(f"{name} {ms(t)}" for name, t in times.items() if t is not None)
        ratio = "" if floor is None else f"{floor / taken:.2f}"
        self.row([op.name, op.shape, ms(taken), ms(floor), ratio, rate, *beside, rest])

    def row(self, cells: list[str]) -> None:
        self.rows.append("| " + " | ".join(cells) + " |")
        print(self.rows[-1], flush=True)


HEAD = ["op", "shape", "ms", "floor ms", "ratio", "GB/s", "eager ms", "torch.compile ms", "others (ms)"]


def ms(seconds: float | None) -> str:
    """Milliseconds as text, "-" for none."""
    return "-" if seconds is None else f"{seconds * 1e3:.3f}"
