"""The machine that a plan is for: ranks, memory and bandwidths, as a small dataclass that is a YAML file.

::

    name: 8xa100
    ranks: 8
    nodes: 1
    memory_gib: 80            # of one rank's device
    memory_gb_s: 2039         # reading and writing one rank's memory in a row
    lookup_gb_s: 1223         # the same for rows read here and there
    tflops: 78                # matrix products in the dense part's dtype, as they are reached in practice
    intra_node_gb_s: 240      # what one rank sends to ranks of its node at once
    inter_node_gb_s: 25       # what one rank sends to ranks of other nodes at once
    call_us: 5                # of any op
    message_us: 20            # of any collective
    shard_us: 0.5             # of each shard in a step: its part of the launches, on the rank that holds it and on those that ask it
    reserved: 0.1             # part of the memory that is not planned with: the allocator's, the communication library's
"""
from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from ...passes.cost import Rates
from ..errors import PlanError, nearest

GIB, GB = 1024.0**3, 1e9


@dataclass(frozen=True)
class Topology:
    """See the module. Numbers are those of one rank. Raises :class:`PlanError` for what cannot be."""

    ranks: int
    memory_gib: float
    memory_gb_s: float
    lookup_gb_s: float
    tflops: float
    intra_node_gb_s: float
    inter_node_gb_s: float = 0.0
    nodes: int = 1
    call_us: float = 5.0
    message_us: float = 20.0
    shard_us: float = 0.5
    reserved: float = 0.1
    name: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("name", "source"):
                good, needed = isinstance(value, str), "a text"
            elif f.name in ("ranks", "nodes"):
                good, needed = type(value) is int and value >= 1, "a whole number from 1"
            elif f.name in ("call_us", "message_us", "shard_us", "inter_node_gb_s"):
                good, needed = _is_number(value) and value >= 0, "a number from 0"
            elif f.name == "reserved":
                good, needed = _is_number(value) and 0 <= value < 1, "a part from 0 to less than 1"
            else:
                good, needed = _is_number(value) and value > 0, "a number above 0"
            if not good:
                raise PlanError(f"topology: {f.name} is {value!r}; it must be {needed}")
        if self.ranks % self.nodes:
            raise PlanError(f"topology: {self.ranks} ranks on {self.nodes} nodes; every node has equally many")
        if self.nodes > 1 and not self.inter_node_gb_s:
            raise PlanError("topology: inter_node_gb_s is missing; with several nodes it must be above 0")

    @property
    def ranks_per_node(self) -> int:
        return self.ranks // self.nodes

    @property
    def memory(self) -> float:
        """Bytes of one rank that may be planned with."""
        return self.memory_gib * GIB * (1 - self.reserved)

    @property
    def rates(self) -> Rates:
        """For the cost of nodes (``passes/cost.py``); the wire is the slowest that a collective over all ranks crosses."""
        wire = self.inter_node_gb_s if self.nodes > 1 else self.intra_node_gb_s
        return Rates(self.memory_gb_s * GB, self.tflops * 1e12, wire * GB, self.call_us * 1e-6, self.message_us * 1e-6, self.intra_node_gb_s * GB)

    def all_to_all(self, bytes_to_each: float) -> float:
        """Seconds in which a rank sends so much to each other rank. Links inside and between nodes work at once: the slower counts."""
        return max(self.inside_node(bytes_to_each), self.ranks_per_node * self.across_nodes(bytes_to_each))

    def inside_node(self, bytes_to_each: float) -> float:
        """Seconds in which a rank sends so much to each other rank of its node."""
        return (self.ranks_per_node - 1) * bytes_to_each / (self.intra_node_gb_s * GB)

    def across_nodes(self, bytes_to_each: float) -> float:
        """Seconds in which a rank sends so much to one rank of each other node."""
        return (self.nodes - 1) * bytes_to_each / (self.inter_node_gb_s * GB) if self.nodes > 1 else 0.0

    def all_reduce(self, count: float) -> float:
        """Seconds of an all-reduce of so many bytes: a reduce-scatter inside each node, an all-reduce of the parts between nodes, and an
        all-gather inside."""
        g, n = self.ranks_per_node, self.nodes
        inside = 2 * count * (g - 1) / g / (self.intra_node_gb_s * GB)
        return inside + (2 * count / g * (n - 1) / n / (self.inter_node_gb_s * GB) if n > 1 else 0.0)

    def with_ranks(self, ranks: int) -> Topology:
        """The same machines, more or fewer of them: full nodes, or a part of one."""
        per_node = self.ranks_per_node
        nodes = max(1, ranks // per_node)
        return replace(self, ranks=ranks, nodes=nodes, name=f"{ranks} ranks as in {self.name}" if self.name else "")

    # --- text ----------------------------------------------------------------------------------------------------------------

    @staticmethod
    def from_dict(raw: Any) -> Topology:
        """Raises :class:`PlanError` naming the key and its nearest match."""
        if not isinstance(raw, Mapping):
            raise PlanError(f"a topology is {raw!r}; it must be a mapping of keys such as ranks and memory_gib")
        known = {f.name: f for f in fields(Topology)}
        for key in raw:
            if key not in known:
                raise PlanError(f"topology: no key '{key}'{nearest(str(key), known)}. Known: {', '.join(known)}")
        missing = [name for name in ("ranks", "memory_gib", "memory_gb_s", "lookup_gb_s", "tflops", "intra_node_gb_s") if name not in raw]
        if missing:
            raise PlanError(f"topology: {', '.join(missing)} missing. 'python -m tablewright topology' measures this machine")
        return Topology(**raw)

    @staticmethod
    def load(where: Topology | Mapping[str, Any] | str | Path) -> Topology:
        """A topology from itself, plain values, the name of a preset ("8xh100", "16x8xh100" for 16 nodes), or a YAML file."""
        if isinstance(where, Topology):
            return where
        if not isinstance(where, (str, Path)):
            return Topology.from_dict(where)
        text = str(where)
        if not text.endswith((".yaml", ".yml")):
            return preset(text)
        if not Path(text).is_file():
            if Path(text).stem in _names():
                return preset(Path(text).stem)
            raise PlanError(f"there is no topology file {text}. Presets: {', '.join(_names())}")
        try:
            return Topology.from_dict(yaml.safe_load(Path(text).read_text()))
        except yaml.YAMLError as error:
            raise PlanError(f"{text} is not valid YAML: {error}") from error
        except PlanError as error:
            raise PlanError(f"{text}: {error}") from None

    def to_yaml(self) -> str:
        return yaml.safe_dump({k: v for k, v in asdict(self).items() if v != ""}, sort_keys=False, width=130)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_yaml())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value and abs(value) != float("inf")


# --- presets -----------------------------------------------------------------------------------------------------------------

# Data sheets give peaks. Of the memory's, streaming kernels reach about 0.9 and FBGEMM's table-batched forward 0.6 (its pull request
# 4757: 64.7 % of peak); of dense TF32 products half; of NVLink (half of the bidirectional figure is one direction) and of the network 0.8.
_STREAM, _LOOKUP, _PRODUCTS, _WIRE = 0.9, 0.6, 0.5, 0.8
_DEVICES = {  # GiB, GB/s of memory, TFLOP/s of TF32 without sparsity, NVLink GB/s both ways, network GB/s of one GPU, data sheet
    "a100": (80, 2039, 156, 600, 25, "NVIDIA A100 80GB SXM data sheet; DGX A100: eight 200 Gb/s ports"),
    "h100": (80, 3350, 494.5, 900, 50, "NVIDIA H100 SXM data sheet; DGX H100: eight 400 Gb/s ports"),
    "h200": (141e9 / GIB, 4800, 494.5, 900, 50, "NVIDIA H200 SXM data sheet; DGX H200: eight 400 Gb/s ports"),
}


def _names() -> list[str]:
    return [f"8x{device}" for device in _DEVICES]


def preset(name: str) -> Topology:
    """``8xh100``: a node of eight; ``16x8xh100``: sixteen such nodes. Raises :class:`PlanError` for others."""
    *counts, device = name.lower().split("x")
    if device not in _DEVICES or not 1 <= len(counts) <= 2 or not all(c.isdecimal() and int(c) >= 1 for c in counts):
        close = nearest(name, _names())
        raise PlanError(f"there is no topology '{name}'{close}: a preset such as {', '.join(_names())} or 16x8xh100, or a .yaml file, was needed")
    nodes, per_node = int(counts[0]) if len(counts) == 2 else 1, int(counts[-1])
    gib, memory, tflops, link, network, source = _DEVICES[device]
    return Topology(
        ranks=nodes * per_node, nodes=nodes, memory_gib=round(gib, 2), memory_gb_s=round(memory * _STREAM), lookup_gb_s=round(memory * _LOOKUP),
        tflops=tflops * _PRODUCTS, intra_node_gb_s=link / 2 * _WIRE, inter_node_gb_s=network * _WIRE, name=name.lower(), source=source,
    )  # fmt: skip


def here(ranks: int, nodes: int, device: torch.device) -> Topology:
    """A guess at the machine that this process runs on, for ranks on such devices: its memory, and bandwidths by the kind of device. Nothing is
    measured; ``python -m tablewright topology`` does that. An unknown GPU is counted as an A100."""
    per_node = max(1, ranks // nodes)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        known = next((d for d in _DEVICES if d in properties.name.lower()), "a100")
        like = preset(f"{nodes}x{per_node}x{known}")
        return replace(like, memory_gib=properties.total_memory / GIB, source=f"by the name {properties.name}")
    memory, bandwidth = machine_memory() / per_node / GIB, 20.0
    return Topology(
        ranks=ranks, nodes=nodes, memory_gib=memory, memory_gb_s=bandwidth, lookup_gb_s=bandwidth / 2, tflops=0.1, intra_node_gb_s=1.0, inter_node_gb_s=1.0,
        call_us=2.0, message_us=300.0, shard_us=5.0, name=f"{ranks} processes", source="assumed for a CPU",
    )  # fmt: skip


def machine_memory() -> float:
    """Bytes of this machine."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
