"""Door 3: ``torch._dynamo`` with a backend of ours, in one graph or in pieces around what cannot be captured.

Dynamo follows Python itself: its guards say when a graph holds, it puts back what forward() writes to modules, and it takes
inputs of any class. Each graph becomes a :class:`~.pieces.Piece`. A model that dynamo cannot follow either runs plainly
(:class:`Plain`). Both are *programs*: they run by themselves, and what Python reads is looked at in every call.
"""
from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo  # noqa: F401  (not loaded by ``import torch``)
from torch import fx, nn
from torch._dynamo.exc import TorchDynamoException
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError, GuardOnDataDependentSymNode

from ..errors import CaptureError, explain
from .guards import Guards
from .pieces import Piece, Rewrite
from .recording import ReadLog, is_users, raised_at, recording

# what dynamo may put into one graph; a recompilation reads them again, so they hold for every call
_CONFIG = {"allow_rnn": True, "specialize_float": True}
_PIECES = {**_CONFIG, "suppress_errors": True}  # what dynamo fails at runs as it is, like what it cannot capture
_WHOLE = {**_CONFIG, "capture_scalar_outputs": True, "capture_dynamic_output_shape_ops": True}
# graphs per function: modes, gradients on and off, batches of 0, 1 and more, dtypes
_OWN_CACHE = {key: value for key, value in {"recompile_limit": 64, "isolate_recompiles": True}.items()
              if key in inspect.signature(torch.compile).parameters}
_NOT_WHOLE = (TorchDynamoException, GuardOnDataDependentSymNode, ConstraintViolationError)
_MANY = 16  # more graphs of one function than that: something that Python reads changes at every call


class NotWhole(CaptureError):
    """One graph was asked for, and is not to be had."""

    def __init__(self, why: str) -> None:
        self.why = why
        super().__init__(explain(
            "the model no longer runs as one graph", why=why,
            fix="take in_backward and trainable out of the plan: pieces of a model cannot follow them"))


class Plain:
    """The model as it is. ``why``: what could not be captured, with its file:line."""

    door = "none"

    def __init__(self, shell: nn.Module, entry: str, why: str) -> None:
        self.shell, self.entry, self.why = shell, entry, why
        self.pieces: list[Piece] = []

    def __call__(self, args: tuple, kwargs: dict) -> Any:
        return getattr(self.shell, self.entry)(*args, **kwargs)

    def rewritten_by(self, rewrite: Rewrite) -> None:
        """There is nothing to rewrite."""

    def on(self, shell: nn.Module, rewrite: Rewrite | None) -> Plain:
        """The same program for a copy of the model."""
        return Plain(shell, self.entry, self.why)


class Dynamo:
    """The model through dynamo. ``pieces``: the graphs that ran in the last call that :meth:`watch` saw; ``breaks``: why there
    is more than one, each with the user's file:line."""

    def __init__(self, shell: nn.Module, entry: str, rewrite: Rewrite | None = None, whole: bool = True) -> None:
        self.shell, self.entry, self.whole = shell, entry, whole
        self.breaks: list[str] = []
        self.pieces: list[Piece] = []
        self.only_whole = False  # the plan asks for what pieces cannot give
        self._rewrite, self._warned, self._compiled = rewrite, False, 0
        self._every: list[Piece] = []
        self._called: list[Piece] = []
        self._failure: Exception | None = None  # of a rewrite: not dynamo's to suppress
        self._compile()

    @property
    def door(self) -> str:
        return "dynamo" if self.whole else "dynamo, in pieces"

    def _compile(self) -> None:
        self._run = torch.compile(
            getattr(self.shell, self.entry), backend=self._backend, fullgraph=self.whole, dynamic=True, **_OWN_CACHE)

    def _backend(self, module: fx.GraphModule, examples: list) -> Callable[..., Any]:
        try:
            piece = Piece(self.shell, module, self._rewrite, self._called)
        except Exception as error:
            self._failure = error
            raise
        self._every.append(piece)
        this = torch._guards.CompileContext.current_compile_id()
        self._compiled = max(self._compiled, 0 if this is None else this.frame_compile_id or 0)
        return piece.__call__

    def __call__(self, args: tuple, kwargs: dict) -> Any:
        self._called.clear()
        if self._compiled > _MANY and not self.only_whole:
            return self._plainly(args, kwargs)
        if self.whole:
            try:
                with _configured(_WHOLE):
                    return self._run(*args, **kwargs)
            except _NOT_WHOLE as error:  # raised before any of the model's code has run
                if self.only_whole:
                    raise NotWhole(_said(error)) from error
                self.in_pieces(_said(error))
        self._failure = None
        with _configured(_PIECES):
            result = self._run(*args, **kwargs)
        if self._failure is not None:
            raise self._failure
        return result

    def _plainly(self, args: tuple, kwargs: dict) -> Any:
        if not self._warned:
            self._warned = True
            warnings.warn(f"{type(self.shell).__name__}.{self.entry} has been captured {_MANY} times, because something that Python "
                          "reads changes at every call; from now on it runs plainly", stacklevel=4)
        return getattr(self.shell, self.entry)(*args, **kwargs)

    def in_pieces(self, why: str) -> None:
        """From now on what cannot be captured runs as it is, between graphs."""
        self.breaks.append(why)
        self.whole = False
        self._every.clear()
        self._compile()

    def watch(self) -> None:
        """Take the pieces that the last call ran for those that the report is about."""
        self.pieces = list(dict.fromkeys(self._called))

    def rewritten_by(self, rewrite: Rewrite) -> None:
        """Run every piece as ``rewrite`` makes it, those to come too."""
        self._rewrite = rewrite
        for piece in self._every:
            piece.rewritten_by(rewrite)

    def on(self, shell: nn.Module, rewrite: Rewrite | None) -> Dynamo:
        """The same program for a copy of the model; it is compiled at its first call."""
        twin = Dynamo(shell, self.entry, rewrite, self.whole)
        twin.breaks, twin.only_whole = list(self.breaks), self.only_whole
        return twin


@contextmanager
def _configured(settings: dict[str, bool]):
    config = torch._dynamo.config
    before = [(name, getattr(config, name)) for name in settings]
    for name, value in settings.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name, value in before:
            setattr(config, name, value)


def _said(error: BaseException) -> str:
    """One sentence of dynamo's explanation, and the user's line."""
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = next((line for line in lines if not line.startswith(("from user code", "Explanation"))), type(error).__name__)
    more = next((line.removeprefix("Explanation:").strip() for line in lines if line.startswith("Explanation:")), "")
    where = raised_at(error)
    stack = getattr(error, "real_stack", None)
    for file, line in [(frame.filename, frame.lineno) for frame in stack or ()] or re.findall(r'File "([^"]+)", line (\d+)', text):
        if is_users(str(file)):
            where = f"{file}:{line}"
    return f"{first[:160]}{f': {more[:200]}' if more else ''}{f' at {where}' if where else ''}"


class Watch(Guards):
    """The guards of a program. It serves every call; all there is to do is to pass on what changed on the user's own modules."""

    def __init__(self, shell: nn.Module, originals: dict[str, nn.Module] | None, log: ReadLog):
        log.modes, log.flags = set(), set()
        for path, seen in log.attributes.items():  # what forward() itself makes is not the user's to change
            module = shell.get_submodule(path) if path else shell
            log.attributes[path] = {name: value for name, value in seen.items() if name in module.__dict__}
        super().__init__(shell, originals, _AnyInputs(), log)  # type: ignore[arg-type]

    def failure(self, args: tuple, kwargs: dict) -> str | None:
        for ref, group in self._original_groups:
            module = ref()
            if module is not None and group.explain(module.__dict__) is not None:
                self.sync()
                self._snapshot()
                break
        return None


class _AnyInputs:
    """What stands for the structure of inputs where a program takes them as they come."""

    names: list[str] = []
    tensors: list[int] = []
    placeholders: list[int] = []
    baked: dict[int, object] = {}
    spec = None

    @staticmethod
    def flatten(args: tuple, kwargs: dict) -> None:
        return None


class _ReadsOnly(ReadLog):
    """Notes what is read and lets every write happen. ``tables``: names of the tensors read."""

    def __init__(self, shell: nn.Module):
        super().__init__(shell)
        self.tensors: set[int] = set()

    def tensor(self, module, name, value):
        self.tensors.add(id(value))
        return value

    def absent(self, module, name) -> None:
        """Nothing is refused for it."""

    def write(self, module, name, value) -> bool:
        return True


def reads_of(shell: nn.Module, entry: str, args: tuple, kwargs: dict) -> _ReadsOnly:
    """What one plain call of ``entry`` reads. State that it changes is the caller's to put back."""
    log = _ReadsOnly(shell)
    with recording(log, calls=False), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        getattr(shell, entry)(*args, **kwargs)
    return log
