"""One self-contained HTML page from the data of :mod:`.graph_data`: no network, no framework, opens from ``file://``."""
from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

_HERE = Path(__file__).parent
_SCRIPTS = ("data.js", "group.js", "layout.js", "draw.js", "panels.js", "ranks.js", "code.js", "tree.js", "app.js", "keys.js")
_PACK_FROM = 1_000_000  # bytes of JSON from which the data is deflated


def page(data: Mapping[str, Any]) -> str:
    """The page as text. Whatever ``data`` holds (names of modules, lines of source) is shown as text and never run: the page's
    policy allows its own script and style by their hashes only, and no request at all."""
    style = (_HERE / "page" / "style.css").read_text(encoding="utf-8")
    script = _slim_js("\n".join((_HERE / "page" / name).read_text(encoding="utf-8") for name in _SCRIPTS))
    dagre = (_HERE / "vendor" / "dagre.min.js").read_text(encoding="utf-8").split("\n//# sourceMappingURL", 1)[0]
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True, allow_nan=False).replace("<", "\\u003c")
    packed = "none"
    if len(text) > _PACK_FROM:
        text, packed = base64.b64encode(zlib.compress(text.encode(), 6)).decode(), "deflate"
    policy = (
        f"default-src 'none'; script-src {_hash(script)} {_hash(dagre)} blob:; style-src {_hash(style)}; worker-src blob:; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    return Template((_HERE / "page" / "page.html").read_text(encoding="utf-8")).substitute(
        csp=policy, title=html.escape(_title(data)), style=style, script=script, dagre=dagre, data=text, packed=packed
    )  # fmt: skip


def _title(data: Mapping[str, Any]) -> str:
    return f"{data.get('title', 'model')[:80]} - Tablewright"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _slim_js(text: str) -> str:
    """Without indentation and comments on lines of their own."""
    text = re.sub(r"^\s*/\*\*.*?\*/\s*$", "", text, flags=re.M | re.S)
    lines = (line.strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line and not line.startswith("//") and line != '"use strict";')
