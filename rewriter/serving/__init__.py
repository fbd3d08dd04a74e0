"""Serving: one captured model exported as a graph without tables, rows in files, and what runs them.

``export.py`` and what only it uses need torch and onnx. ``predictor.py``, ``manifest.py``, ``http_server.py`` and ``shard_server.py``
import no torch: ``pip install tablewright --no-deps`` and the requirements of the extra ``serving`` make a serving image.
"""
