"""A model over several ranks: agreeing on the plan, cutting the tables, and keeping what every rank holds equal.

Weights start as rank 0 has them, as with DistributedDataParallel. A sharded table's parameter holds this rank's block of it (no rows
where the rank has none), under the table's plain name; the user's own model keeps its whole tables, untouched.
"""
from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from ..kernels.collectives.gradients import GradientAverage
from ..kernels.collectives.row_squares import RowSquares
from ..kernels.collectives.spec import Shard, TableLayout
from ..kernels.embedding.reference import Reads
from ..kernels.memory import promised
from ..passes.shard_tables import ANCHOR, Sharding
from ..passes.table_gradients import Choice
from . import shard_map
from .capture import Captured
from .capture.data_guard import asserted
from .clipping import guard_block
from .errors import PlanError
from .meta_weights import begin, draw
from .plan import TablePlan
from .sample_reads import even_cuts, exchange_bytes
from .sharded_state import follow_state_dicts

if TYPE_CHECKING:
    from .optimized_model import OptimizedModel

_ELEMENTWISE = ("SGD", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Adadelta", "ASGD", "Rprop", "SparseAdam")


@dataclass(frozen=True)
class Ranks:
    """The ranks of a mesh, numbered in its order: ``rank`` of ``world``, ``per_node`` of them in each node. ``group``: a process
    group over them for exchanges, ``averages`` another one for the gradients of what all of them hold: neither mixes with what a user
    runs in the mesh's own (a checkpoint that is written meanwhile). Of several nodes of several ranks: ``inside`` is a group of this rank's
    node, ``across`` one of the ranks with its place in every node."""

    rank: int
    world: int
    per_node: int
    group: Any
    averages: Any
    inside: Any = None
    across: Any = None

    @staticmethod
    def of(mesh: DeviceMesh) -> Ranks:
        """Raises :class:`PlanError` for a mesh of more than two dimensions (nodes, ranks in a node), or of two in which ranks do not ascend."""
        group = Ranks.group_of(mesh)
        per_node = mesh.mesh.shape[-1] if mesh.ndim == 2 else mesh.size()
        groups = _own(group, 2)
        if 1 < per_node < mesh.size():
            groups = (*groups, *_own(mesh.get_group(1), 1), *_own(mesh.get_group(0), 1))
        return Ranks(dist.get_rank(group), dist.get_world_size(group), per_node, *groups)

    @staticmethod
    def group_of(mesh: DeviceMesh) -> Any:
        """The process group of all ranks of a mesh."""
        if not isinstance(mesh, DeviceMesh):
            raise PlanError(f"mesh is a {type(mesh).__name__}; it must be a torch.distributed.device_mesh.DeviceMesh")
        if mesh.ndim > 2:
            raise PlanError(f"mesh has {mesh.ndim} dimensions; it must have one (ranks) or two (nodes, ranks in a node)")
        numbers = mesh.mesh.reshape(-1).tolist()
        if mesh.ndim == 1:
            return mesh.get_group()
        if numbers != sorted(numbers):
            raise PlanError(f"mesh has the ranks {mesh.mesh.tolist()}; nodes one after another were needed, each with its ranks in ascending order")
        if numbers == list(range(dist.get_world_size())):
            return dist.group.WORLD
        return mesh._flatten().get_group()

    def agree(self, value: Any) -> list[Any]:
        """``value`` of every rank."""
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, group=self.group)
        return found


# All models of a mesh share its groups: each holds threads and connections to its ranks until the process ends.
_others: weakref.WeakKeyDictionary[Any, tuple[Any, ...]] = weakref.WeakKeyDictionary()


def _own(group: Any, count: int) -> tuple[Any, ...]:
    """So many process groups over the ranks of ``group`` that nobody else uses."""
    if group not in _others:
        _others[group] = tuple(_another(group) for _ in range(count))
    return _others[group]


def _another(group: Any) -> Any:
    """A process group over the ranks of ``group``, with its timeout."""
    backend = group._get_backend(torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu"))
    return dist.new_group(
        dist.get_process_group_ranks(group), timeout=getattr(getattr(backend, "options", None), "_timeout", None),
        backend=dist.get_backend(group), use_local_synchronization=True,
    )  # fmt: skip


class ShardedTables:
    """What the ranks agreed on, and the cutting of tables."""

    def __init__(self, ranks: Ranks, tables: Mapping[str, Tensor], resolved: Mapping[str, TablePlan], numerics: str) -> None:
        self.ranks, self.resolved = ranks, resolved
        self.shapes = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tables.items()}
        self.layouts = shard_map.layouts(self.shapes, resolved, ranks.world, ranks.per_node)
        for name, layout in self.layouts.items():
            codecs = (layout.forward, layout.backward)
            if codecs != ("fp32", "fp32") and numerics != "approximate":
                raise PlanError(
                    f"table '{name}' asks for rows to travel as {codecs[0]} and gradients as {codecs[1]}, which rounds them, and the plan "
                    f"allows numerics: {numerics}. Say numerics: approximate, or leave communication out"
                )
        self.digest = ""
        self.whole: dict[str, tuple[torch.Size, torch.dtype, torch.device]] = {}  # what was cut, for captures later on
        self.empty: Container[int] = ()  # ids of stand-ins for tables that were on the meta device
        self.in_backward: list[str] = []  # whole tables that are updated inside the backward
        self.average: GradientAverage | None = None

    def settle(self, reads: Callable[[], dict[str, list[Reads]]] | None) -> None:
        """Fix what depends on the sample, and see that all ranks agree. ``reads``: what the sample looks up (``None``: no sample).
        Raises :class:`PlanError` where they do not."""
        if self.digest:
            return
        uneven = [n for n, layout in self.sharded().items() if self.resolved[n].split == "sample" and len({s.row for s in layout.shards}) > 1]
        if uneven and reads is not None:
            found = reads()
            cuts = {n: self._cuts(n, found.get(n, [])) for n in uneven}
            self.layouts = shard_map.layouts(self.shapes, self.resolved, self.ranks.world, self.ranks.per_node, cuts)
        undecided = [n for n, layout in self.layouts.items() if layout.exchange == "auto"]
        if undecided:
            found = reads() if reads is not None else {}
            mine = {n: exchange_bytes(self._counted(n), found[n], self.shapes[n].element_size()) for n in undecided if n in found and self.layouts[n].shards}
            everyone = self.ranks.agree(mine)
            for name in undecided:
                counted = [each[name] for each in everyone if name in each]
                pooled, unique = (sum(c[kind] for c in counted) for kind in ("pooled", "unique"))
                layout, fewer = self.layouts[name], unique < pooled
                self.layouts[name] = replace(layout, exchange="unique" if fewer else "pooled", by_node=0 if fewer else layout.by_node)
        self.digest = shard_map.digest(self.layouts)
        given = self.ranks.agree(self.digest)
        ranks = self.ranks
        others = [r for r, digest in enumerate(given) if digest != given[0]]
        if others:
            raise PlanError(
                f"the ranks resolved different plans: rank {others[0]} has {given[others[0]][:12]}, rank 0 has {given[0][:12]} "
                f"(this is rank {ranks.rank}). Every rank needs the same model, plan and mesh. This rank's:\n{shard_map.table(self.layouts)}"
            )

    def _counted(self, name: str) -> TableLayout:
        """The layout whose bytes decide: where bags are added up inside nodes, that across nodes."""
        layout = self.layouts[name]
        return layout.across(layout.by_node) if layout.by_node else layout

    def _cuts(self, name: str, reads: list[Reads]) -> list[int]:
        """Where ranges of rows begin, by what the samples of all ranks read."""
        rows, parts = self.layouts[name].rows, len({s.row for s in self.layouts[name].shards})
        counts = torch.bincount(torch.cat([torch.empty(0, dtype=torch.int64), *(r.rows for r in reads)]), minlength=rows)
        dist.all_reduce(counts, group=self.ranks.group)
        return even_cuts(rows, parts, counts)

    @property
    def sharding(self) -> Sharding:
        """What the passes need to know."""
        ranks = self.ranks
        nodes = () if ranks.inside is None else (ranks.per_node, ranks.inside.group_name, ranks.across.group_name)
        return Sharding(self.layouts, ranks.rank, ranks.world, ranks.group.group_name, *nodes)

    def sharded(self) -> dict[str, TableLayout]:
        """The layouts of the tables that are cut."""
        return {name: layout for name, layout in self.layouts.items() if not layout.replicated}

    def refuse_programs(self, captured: list[Captured]) -> None:
        """Raises :class:`PlanError` where the model is no one graph and a table is to be cut."""
        cut = next(iter(self.sharded()), None)
        for each in captured:
            if each.program is not None and cut is not None:
                raise PlanError(f"the plan shards table '{cut}', which needs {each.entry}() as one graph; but {each.notes[0]}")
            if cut is not None and asserted(each.graph):
                raise PlanError(f"the plan shards table '{cut}', and ranks whose data take different ways would wait for each other: {each.notes[0]}")

    def choices(self, chosen: dict[str, Choice]) -> dict[str, Choice]:
        """Who trains each table: one that every rank holds is updated when its gradients have been averaged, at the end of the backward."""
        replicated = {name for name, layout in self.layouts.items() if layout.replicated}
        self.in_backward = [n for n, c in chosen.items() if n in replicated and c.grad == "in_backward"]
        return {n: replace(c, grad="sparse") if n in self.in_backward else c for n, c in chosen.items()}

    # --- cutting -----------------------------------------------------------------------------------------------------------------

    def place(self, shell: nn.Module, optimizer: Optimizer | None, empty: Container[int]) -> None:
        """Put this rank's blocks in place of the whole tables, in the shell and in ``optimizer``; everything has the values of rank 0
        afterwards. ``empty``: ids of stand-ins for tables that were on the meta device."""
        self.empty = empty
        for name, layout in self.layouts.items():
            table = shell.get_parameter(name) if layout.replicated and isinstance(self._home(shell, name), nn.Module) else None
            if table is not None and id(table) in empty:
                draw(table, Shard(0, 0, layout.rows, 0, layout.dim), self._home(shell, name))
                self._begin(optimizer, table)
        self._spread(shell)
        self._cut(shell, optimizer)

    def _home(self, shell: nn.Module, name: str) -> nn.Module:
        return shell.get_submodule(name.rpartition(".")[0])

    def _begin(self, optimizer: Optimizer | None, table: Tensor) -> None:
        for group in optimizer.param_groups if optimizer is not None else ():
            if any(p is table for p in group["params"]):
                begin(optimizer, group, table)

    def _cut(self, shell: nn.Module, optimizer: Optimizer | None) -> None:
        named = dict(shell.named_parameters(remove_duplicate=False))
        made: dict[str, nn.Parameter] = {}
        replaced: dict[int, nn.Parameter] = {}
        for name, layout in self.sharded().items():
            whole = named[name]
            self.whole[name] = (whole.shape, whole.dtype, whole.device)
            if id(whole) in self.empty:
                mine = self.mine(layout)
                block = torch.empty(mine.rows, mine.columns, dtype=whole.dtype)
                draw(block, mine, self._home(shell, name))
            else:
                block = self._block(whole, layout)
            block = nn.Parameter(block, requires_grad=whole.requires_grad)
            made[name] = replaced[id(whole)] = block
        for module in shell.modules():
            for key, param in module._parameters.items():
                if id(param) in replaced:
                    module._parameters[key] = replaced[id(param)]
        if optimizer is not None:
            self._cut_state(optimizer, {id(named[n]): (block, self.layouts[n]) for n, block in made.items()})

    def mine(self, layout: TableLayout) -> Shard:
        """This rank's block; an empty one where it has none."""
        return layout.on(self.ranks.rank) or Shard(self.ranks.rank, 0, 0, 0, layout.dim)

    def _block(self, whole: Tensor, layout: TableLayout) -> Tensor:
        """This rank's block of rank 0's table. Rank 0 sends each rank its own."""
        mine = self.mine(layout)
        source = dist.get_global_rank(self.ranks.group, 0)
        block = part_of(whole.detach(), mine).clone(memory_format=torch.contiguous_format)
        if self.ranks.rank == 0:
            for shard in layout.shards:
                if shard.rank:
                    target = dist.get_global_rank(self.ranks.group, shard.rank)
                    dist.send(part_of(whole.detach(), shard).contiguous(), target, group=self.ranks.group)
        elif layout.on(self.ranks.rank) is not None:
            dist.recv(block, source, group=self.ranks.group)
        return block

    def _cut_state(self, optimizer: Optimizer, blocks: dict[int, tuple[nn.Parameter, TableLayout]]) -> None:
        for group in optimizer.param_groups:
            for i, param in enumerate(group["params"]):
                if id(param) not in blocks:
                    continue
                kind = getattr(type(optimizer), "_base", type(optimizer)).__name__
                if kind not in _ELEMENTWISE:
                    raise PlanError(
                        f"table '{blocks[id(param)][1].name}' is sharded, and {kind} is not an optimizer that is known to treat every "
                        f"element by itself ({', '.join(_ELEMENTWISE)}): let the plan's embedding_optimizer train the tables"
                    )
                block, layout = blocks[id(param)]
                group["params"][i] = block
                if id(param) in self.empty:
                    begin(optimizer, group, block)
                state = optimizer.state.pop(param, None)
                if state is not None:
                    mine = self.mine(layout)
                    optimizer.state[block] = {
                        k: part_of(v, mine).clone() if isinstance(v, Tensor) and v.shape == param.shape else v for k, v in state.items()
                    }

    # --- what every rank holds -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _spread(self, shell: nn.Module) -> None:
        """Give all parameters and buffers that are not cut the values of rank 0."""
        cut = set(self.sharded())
        source = dist.get_global_rank(self.ranks.group, 0)
        for name, tensor in [*shell.named_parameters(), *shell.named_buffers()]:
            if name not in cut and tensor.numel():
                held = tensor.detach()
                held = held if held.is_contiguous() else held.contiguous()
                dist.broadcast(held, source, group=self.ranks.group)
                if held.data_ptr() != tensor.data_ptr():
                    tensor.copy_(held)

    # --- later captures ------------------------------------------------------------------------------------------------------------

    def whole_tables(self, shell: nn.Module) -> AbstractContextManager:
        """The shell as it was before its tables were cut: a capture needs their shapes."""
        return whole_tables(shell, self.whole)


@contextmanager
def whole_tables(
    shell: nn.Module, whole: Mapping[str, tuple[torch.Size, torch.dtype, torch.device]], given: Mapping[str, nn.Parameter] | None = None
) -> Iterator[None]:
    """The shell with stand-ins for the parameters of those names, which hold something else: zeros of the shape, dtype and device of
    ``whole``, which take no memory until they are written to, or what is ``given``."""
    given = given or {}
    own = {id(shell.get_parameter(name)): name for name in whole}
    kept = [
        (module._parameters, key, param) for module in shell.modules() for key, param in module._parameters.items() if id(param) in own
    ]  # fmt: skip
    stand_ins = {
        name: given[name] if name in given else nn.Parameter(stand_in(*facts), requires_grad=shell.get_parameter(name).requires_grad)
        for name, facts in whole.items()
    }
    for home, key, param in kept:
        home[key] = stand_ins[own[id(param)]]
    try:
        yield
    finally:
        for home, key, param in kept:
            home[key] = param


def part_of(whole: Tensor, shard: Shard) -> Tensor:
    """The block of a table (a view)."""
    return whole[shard.row : shard.row + shard.rows, shard.column : shard.column + shard.columns]


def stand_in(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A table of zeros. On CPU its pages are only promised: memory is taken by what is written, and reading takes none."""
    if device.type == "cuda" or not shape.numel():
        return torch.zeros(shape, dtype=dtype, device=device)
    return promised(shape, dtype)


def prepare(shell: nn.Module) -> None:
    """What rewritten graphs read beside the model's own tensors."""
    shell.__dict__.setdefault(ANCHOR, torch.zeros(1, requires_grad=True))


def start(tables: ShardedTables, model: OptimizedModel) -> None:
    """From now on ``model`` trains its blocks, and each backward ends with equal gradients of what every rank holds."""
    model._follow_replaced_parameters()
    cut = tables.sharded()
    for each in model._watched:
        if each.home == "_parameters":  # blocks are not the plain model's
            for name in [n for n in each.seen if f"{each.path}.{n}".lstrip(".") in cut or each.ours.get(n) is not each.module()._parameters.get(n)]:
                del each.seen[name]
    optimizer, ranks = model.embedding_optimizer, tables.ranks
    columns = {name: layout for name, layout in cut.items() if layout.columns_split}
    if optimizer is not None and columns:
        optimizer.row_squares = RowSquares(columns, ranks.rank, ranks.group.group_name)
    choices = model._compiler.choices
    mine = {n: p for n, p in model.named_parameters() if n not in cut and p.requires_grad}
    for name, param in model.named_parameters():
        if name in cut and param.requires_grad:
            guard_block(param)
    sparse = [n for n in mine if n in choices and choices[n].grad == "sparse"]
    held = {id(mine[n]) for n in tables.in_backward}

    def done(reached: list[Tensor]) -> None:
        if held:
            optimizer.step_held([p for p in reached if id(p) in held])

    tables.average = GradientAverage([p for n, p in mine.items() if n not in sparse], [mine[n] for n in sparse], ranks.averages.group_name, done)
    model.__dict__["_sharded"] = tables
    follow_state_dicts(tables, model)
