"""See what was rewritten, why, and what it saves: one page, and the same as data for other viewers."""
from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...passes.cost import Rates
from ..errors import PlanError
from .graph_data import RATES, graph_data
from .model_explorer import model_explorer
from .page import page

_HEIGHT = 720  # pixels of the page in a notebook

FORMATS = ("html", "json", "model-explorer")


def visualize(
    model: Any, path: str | Path | None = None, *, format: str = "html", profile: Mapping[str, float] | tuple | None = None,
    sources: bool = True, rates: Rates = RATES, serving: bool = False,
) -> str:  # fmt: skip
    """What ``optimize`` did to ``model`` as one self-contained file; returns its text, and writes it where ``path`` is given.

    ``format``: "html" (a page that opens from ``file://`` and asks the network for nothing), "json" (the data of that page), or
    "model-explorer" (JSON for Google's Model Explorer, for very large graphs). ``profile``: seconds of each node by name, or a
    tuple of inputs, on which every node is timed now (see :func:`.timing.time_nodes`). ``sources=False``: leave out the lines of
    the user's files. ``rates``: how fast the machine is, for predicted times (forward; default: two cores of a server CPU). ``serving``:
    also how an export splits the model into a store of rows and a dense graph. Raises :class:`PlanError` for another format, and ``OSError`` where the file cannot be written.
    """
    if format not in FORMATS:
        raise PlanError(f"visualize() writes {', '.join(FORMATS)}; format is {format!r}")
    if isinstance(profile, tuple):
        from .timing import time_nodes

        seconds: Mapping[str, float] | None = time_nodes(model, *profile)
    else:
        seconds = profile
    data = graph_data(model, seconds, sources, rates, serving)
    text = page(data) if format == "html" else json.dumps(data if format == "json" else model_explorer(data))
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def embedded(model: Any) -> str:
    """The page as an element of another page: what a notebook shows."""
    text = html.escape(page(graph_data(model)), quote=True)
    return f'<iframe srcdoc="{text}" sandbox="allow-scripts allow-downloads" style="width:100%;height:{_HEIGHT}px;border:1px solid #ccc"></iframe>'
