"""Random plain recommenders: source text of an ``nn.Module``, and batches for it, from one ``random.Random``.

A model is made as *text*, so a failure prints a program that a person can run. Every feature is drawn on its own, so that rare
pairs meet: tables as modules, parameters or buffers; each form of lookup; ties; jagged, padded, weighted ids; joins in any order;
in-place writes; dropout; several kinds of call.
"""
from __future__ import annotations

import random

import torch
from random_programs import Input, Program, Read


def program(rng: random.Random, *, plain_tables: bool = False) -> Program:
    """A random program. ``plain_tables``: only lookups that can be fused, of trainable fp32 or fp64 parameters (what an update
    inside the backward can serve)."""
    return _Writer(rng, plain_tables).write()


class _Writer:
    """Writes one program. ``rows`` are values ``[B, width]``, ``sequences`` are ``[B, length, width]``."""

    def __init__(self, rng: random.Random, plain_tables: bool) -> None:
        self.rng, self.plain = rng, plain_tables
        halves = () if plain_tables else ("float16", "bfloat16")
        self.dtype = rng.choice(("float64",) * 4 + ("float32",) * 5 + halves)
        self.init: list[str] = []
        self.body: list[str] = []
        self.inputs: list[Input] = []
        self.rows: list[tuple[str, int]] = []
        self.sequences: list[tuple[str, int, int]] = []
        self.tables: list[tuple[str, int, int]] = []  # expression of the tensor, rows, dim
        self.modules: list[tuple[str, int, str, int | None]] = []  # lookup modules: attribute, table, class, padding
        self.reads: list[Read] = []
        self.read_otherwise: set[str] = set()
        self.trainable: dict[str, int] = {}
        self.dense: set[str] = set()  # tables with a lookup that gives a dense gradient
        self.count = 0

    def chance(self, percent: int) -> bool:
        return self.rng.randrange(100) < percent

    def name(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def write(self) -> Program:
        rng = self.rng
        for _ in range(rng.choice((1, 1, 2, 2, 3, 4, 5, 8))):
            self.table()
        for number in range(len(self.tables)):
            self.lookup(number)
        for _ in range(rng.choice((0, 0, 1, 2))):
            self.lookup(rng.randrange(len(self.tables)))
        if self.chance(70):
            width = rng.randint(1, 6)
            self.inputs.append(Input("dense", "dense", (width,)))
            self.rows.append(("dense", width))
            if self.chance(50):
                self.bottom(width)
        outputs = self.combine()
        names = [n for each in self.inputs for n in each.names()]
        call = rng.choice(("positional", "positional", "keyword", "list", "tuple", "dict"))
        if call in ("positional", "keyword"):
            head, unpack = ", ".join(names), []
        else:
            head = "features"
            unpack = [f"{n} = features[{n!r}]" if call == "dict" else f"{n} = features[{i}]" for i, n in enumerate(names)]
        lines = ["class Model(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines += [f"        {line}" for line in self.init]
        lines += ["", f"    def forward(self, {head}):", *(f"        {line}" for line in [*unpack, *self.body])]
        lines += [f"        return {outputs}"]
        return Program(
            "\n".join(lines) + "\n", self.inputs, call, self.dtype, self.reads, self.trainable, self.read_otherwise,
            set(self.trainable) - self.dense,
        )  # fmt: skip

    def table(self) -> None:
        rng, name = self.rng, self.name("t")
        rows, dim = rng.choice((1, 2, 3, 7, 20, 60)), rng.choice((1, 2, 3, 4, 4, 4, 8, 8, 8, 17, 40))
        home = rng.choice(("module",) * 5 + ("parameter",) + (() if self.plain else ("buffer",)))
        if home == "module":
            kind = rng.choice(("Embedding", "EmbeddingBag"))
            padding = rng.choice((None, None, 0, rows - 1, -1))
            self.module(name, kind, len(self.tables), rows, dim, padding, f"{name}.weight")
            self.tables.append((f"self.{name}.weight", rows, dim))
        elif home == "parameter":
            self.init.append(f"self.{name} = nn.Parameter(torch.randn({rows}, {dim}))")
            self.tables.append((f"self.{name}", rows, dim))
        else:
            self.init.append(f"self.register_buffer({name!r}, torch.randn({rows}, {dim}))")
            self.tables.append((f"self.{name}", rows, dim))
            return
        if self.chance(0 if self.plain else 12):
            self.init.append(f"{self.tables[-1][0]}.requires_grad_(False)")
        else:
            self.trainable[self.tables[-1][0].removeprefix("self.")] = rows

    def module(self, name: str, kind: str, table: int, rows: int, dim: int, padding: int | None, stored: str) -> None:
        options = [] if padding is None else [f"padding_idx={padding}"]
        odd = not self.plain
        if kind == "EmbeddingBag":
            mode = self.rng.choice(("sum", "sum", "mean", "mean") + ("max",) * odd)
            last = self.chance(40)
            options += [f"mode={mode!r}", *(["include_last_offset=True"] if last else [])]
            kind_of = f"bag {mode} {last}"
        else:
            kind_of = "embedding"
        if odd and "max" not in kind_of and self.chance(6):
            options.append("scale_grad_by_freq=True")
            kind_of += " odd"
        if odd and self.chance(6):
            options.append("max_norm=1.0")
            kind_of += " odd"
            self.read_otherwise.add(stored)
        if self.chance(25) and "max" not in kind_of:
            options.append("sparse=True")
        else:
            self.dense.add(stored)
        self.init.append(f"self.{name} = nn.{kind}({', '.join([str(rows), str(dim), *options])})")
        self.modules.append((name, table, kind_of, None if padding is None else padding % rows))

    # --- lookups -------------------------------------------------------------------------------------------------------------

    def lookup(self, table: int) -> None:
        rng = self.rng
        expression, rows, dim = self.tables[table]
        stored = expression.removeprefix("self.")
        own = [m for m in self.modules if m[1] == table]
        is_parameter = bool(own) or stored in self.trainable
        if is_parameter and self.chance(70):
            if not own or self.chance(20):  # the same Parameter in a second module
                name = self.name("tied")
                padding = rng.choice((None, None, 0, -1))
                self.module(name, rng.choice(("Embedding", "EmbeddingBag")), table, rows, dim, padding, stored)
                self.init.append(f"self.{name}.weight = {expression}")
                own = [self.modules[-1]]
            name, _, kind, padding = rng.choice(own)
            if kind.startswith("bag"):
                _, mode, last, *odd = kind.split()
                self.bag(f"self.{name}(", mode, last == "True", table, padding, [], bool(odd))
            else:
                self.plain_lookup(lambda ids: f"self.{name}({ids})", table, padding, "odd" in kind)
            return
        form = rng.choice(("F.embedding", "F.embedding_bag", "index", "index_select"))
        self.dense.add(stored)
        padding = rng.choice((None, None, None, 0, -rows))
        pad = "" if padding is None else f", padding_idx={padding}"
        kept = None if padding is None else padding % rows
        if form == "F.embedding":
            self.plain_lookup(lambda ids: f"F.embedding({ids}, {expression}{pad})", table, kept)
        elif form == "F.embedding_bag":
            mode = rng.choice(("sum", "mean") + ("max",) * (not self.plain))
            last = self.chance(30)
            options = [f"mode={mode!r}", *(["include_last_offset=True"] if last else [])]
            if pad:
                options.append(f"padding_idx={padding}")
            self.bag("F.embedding_bag(", mode, last, table, kept, options, False, expression)
        elif form == "index":
            self.plain_lookup(lambda ids: f"{expression}[{ids}]", table, None, low=-rows)
        else:
            ids = self.ids(rows, ())
            made = self.name("y")
            self.body.append(f"{made} = torch.index_select({expression}, 0, {ids})" if self.chance(50)
                             else f"{made} = {expression}.index_select(0, {ids})")  # fmt: skip
            self.reads.append(Read(stored, ids, None, "rows"))
            self.row(made, dim)

    def ids(self, rows: int, shape: tuple[int, ...], low: int = 0) -> str:
        """A new input of ids, or one that is there already and fits."""
        fitting = [i for i in self.inputs if i.kind == "ids" and i.shape == shape and i.high <= rows and i.low >= low]
        if fitting and self.chance(40):
            return self.rng.choice(fitting).name
        name, dtype = self.name("ids"), self.rng.choice((torch.int64, torch.int64, torch.int32))
        self.inputs.append(Input(name, "ids", shape, low if self.chance(50) else 0, rows, dtype))
        return name

    def plain_lookup(self, call, table: int, padding: int | None, odd: bool = False, low: int = 0) -> None:
        expression, rows, dim = self.tables[table]
        rank = self.rng.choice((1, 1, 1, 2, 2, 3))
        length = self.rng.choice((1, 2, 3))
        ids = self.ids(rows, ((), (length,), (2, length))[rank - 1], low)
        made = self.name("y")
        self.body.append(f"{made} = {call(ids)}")
        self.reads.append(Read(expression.removeprefix("self."), ids, padding, "other" if odd else "rows"))
        if rank == 1:
            return self.row(made, dim)
        if rank == 3:
            if self.chance(50):
                self.body.append(f"{made} = {made}.sum((1, 2))")
                return self.row(made, dim)
            self.body.append(f"{made} = {made}.flatten(1, 2)")
            length *= 2
        self.sequence(made, ids if rank == 2 else None, length, dim)

    def bag(
        self, head: str, mode: str, last: bool, table: int, padding: int | None, options: list[str], odd: bool, weight: str = ""
    ) -> None:
        expression, rows, dim = self.tables[table]
        weighted = mode == "sum" and self.chance(35)
        extra = [weight] if weight else []
        if last or self.chance(50):
            name = self.name("bag")
            dtype = self.rng.choice((torch.int64, torch.int64, torch.int32))
            self.inputs.append(Input(name, "jagged", (), 0, rows, dtype, last, weighted))
            ids, arguments = name, [name, *extra, f"{name}_offsets"]
            weights = f"{name}_weights"
        else:
            length = self.rng.choice((1, 2, 4))
            ids = self.ids(rows, (length,))
            arguments, weights = [ids, *extra], "weights" + ids
            if weighted and weights not in [i.name for i in self.inputs]:
                self.inputs.append(Input(weights, "dense", (length,)))
        if weighted:
            if self.chance(25):
                self.body.append(f"learned_{weights} = {weights} * self.scale{table}")
                self.init.append(f"self.scale{table} = nn.Parameter(torch.tensor(1.5))")
                weights = f"learned_{weights}"
            options = [*options, f"per_sample_weights={weights}"]
        made = self.name("y")
        self.body.append(f"{made} = {head}{', '.join(arguments + options)})")
        self.reads.append(Read(expression.removeprefix("self."), ids, padding, "other" if odd or mode == "max" else "bags"))
        self.row(made, dim)

    # --- what happens to looked-up rows --------------------------------------------------------------------------------------

    def row(self, name: str, width: int) -> None:
        written = () if self.plain else ("relu_", "mul_", "add")
        action = self.rng.choice(("",) * 8 + ("mask", "double", "dropout", *written))
        line = {
            "relu_": f"{name}.relu_()",
            "mul_": f"{name}.mul_(2.0)",
            "add": f"{name} += 0.5",
            "mask": f"{name} = torch.where({name} > 0, {name}, {name} * 0.1)",
            "double": f"{name} = torch.cat([{name}, {name}], 1)",
            "dropout": f"{name} = F.dropout({name}, {self.rng.choice((0.0, 0.3))}, self.training)",
        }.get(action)
        if line:
            self.body.append(line)
        self.rows.append((name, width * (2 if action == "double" else 1)))

    def sequence(self, name: str, ids: str | None, length: int, width: int) -> None:
        action = self.rng.choice(("keep", "keep", "keep", "sum", "mean", "flatten", "last", "max", "masked"))
        if action == "keep":
            self.sequences.append((name, length, width))
            return
        if action == "masked" and ids is not None:
            self.body.append(f"{name} = {name} * ({ids} != 0).unsqueeze(-1)")
            action = "sum"
        ending = {"sum": ".sum(1)", "mean": ".mean(dim=1)", "flatten": ".flatten(1)", "last": "[:, -1]", "max": ".max(1).values"}
        self.body.append(f"{name} = {name}{ending.get(action, '.sum(1)')}")
        self.row(name, width * length if action == "flatten" else width)

    def bottom(self, width: int) -> None:
        out = self.rng.choice((4, 8))
        self.init.append(f"self.bottom = nn.Linear({width}, {out})")
        self.body.append("x = torch.relu(self.bottom(dense))")
        self.rows[-1] = ("x", out)

    # --- joins and outputs ---------------------------------------------------------------------------------------------------

    def combine(self) -> str:
        rng = self.rng
        self.join_sequences()
        self.stack_rows()
        self.use_densely()
        if len(self.rows) > 2 and self.chance(30):  # a concatenation inside a concatenation
            rng.shuffle(self.rows)
            inner, self.rows = self.rows[:2], self.rows[2:]
            made = self.name("c")
            self.body.append(f"{made} = torch.cat([{inner[0][0]}, {inner[1][0]}], dim=1)")
            self.rows.append((made, inner[0][1] + inner[1][1]))
        rng.shuffle(self.rows)
        total = sum(width for _, width in self.rows)
        joined = ", ".join(name for name, _ in self.rows)
        self.body.append(f"z = torch.cat([{joined}], {rng.choice(('1', '-1', 'dim=-1', 'dim=1'))})")
        extra = []
        if self.chance(0 if self.plain else 20):
            first = self.rows[0][0]
            self.body.append(rng.choice(("z.mul_(1.5)", f"{first}.add_(1.0)" if first != "dense" else "z += 1")))
        if self.chance(30):
            extra.append(rng.choice(self.rows)[0])
        if self.chance(15):
            extra.append("z")
        if self.chance(35):
            self.init.append(f"self.drop = nn.Dropout({rng.choice((0.0, 0.0, 0.25))})")
            self.body.append("h = self.drop(z)")
        else:
            self.body.append("h = z")
        out = rng.choice((1, 3))
        if self.chance(50):
            self.init.append(f"self.head = nn.Sequential(nn.Linear({total}, 5), nn.Tanh(), nn.Linear(5, {out}))")
        else:
            self.init.append(f"self.head = nn.Linear({total}, {out})")
        result = "self.head(h)" + rng.choice(("", "", ".squeeze(-1)", ".sigmoid()"))
        if not extra:
            return result
        return f"{{'y': {result}, 'more': [{', '.join(extra)}]}}" if self.chance(50) else f"({', '.join([result, *extra])})"

    def join_sequences(self) -> None:
        lengths = [length for _, length, _ in self.sequences]
        for length in dict.fromkeys(lengths):
            group = [s for s in self.sequences if s[1] == length]
            if len(group) > 1 and self.chance(60):
                made = self.name("s")
                self.body.append(f"{made} = torch.cat([{', '.join(s[0] for s in group)}], {self.rng.choice((2, -1))})")
                self.sequences = [s for s in self.sequences if s[1] != length] + [(made, length, sum(s[2] for s in group))]
        for name, length, width in self.sequences:
            made = self.name("p")
            action = self.rng.choice(("sum", "mean", "flatten"))
            self.body.append(f"{made} = {name}" + {"sum": ".sum(1)", "mean": ".mean(1)", "flatten": ".flatten(1)"}[action])
            self.rows.append((made, width * length if action == "flatten" else width))

    def stack_rows(self) -> None:
        for width in dict.fromkeys(w for _, w in self.rows):
            group = [r for r in self.rows if r[1] == width]
            if len(group) < 2 or not self.chance(50):
                continue
            self.rng.shuffle(group)
            names, made, count = ", ".join(r[0] for r in group), self.name("k"), len(group)
            action = self.rng.choice(("flatten", "interact", "last", "first", "product", "view"))
            if action == "flatten":
                self.body.append(f"{made} = torch.stack([{names}], dim={self.rng.choice((1, -2))}).flatten(1)")
                size = width * count
            elif action == "interact":
                self.body.append(f"{made} = torch.stack([{names}], 1)")
                self.body.append(f"{made} = torch.bmm({made}, {made}.transpose(1, 2)).flatten(1)")
                size = count * count
            elif action == "last":
                self.body.append(f"{made} = torch.stack([{names}], -1).sum(-1)")
                size = width
            elif action == "first":
                self.body.append(f"{made} = torch.stack([{names}]).sum(0)")
                size = width
            elif action == "view":
                self.body.append(f"{made} = torch.cat([{names}], dim=1).view(-1, {count}, {width}).sum(1)")
                size = width
            else:
                self.body.append(f"{made} = {' * '.join(r[0] for r in group)}")
                size = width
            kept = [] if self.chance(50) else group[:1]  # some are read again
            self.rows = [r for r in self.rows if r not in group] + [(made, size), *kept]

    def use_densely(self) -> None:
        """The table of a lookup is also a matrix: tied output weights, or a penalty on its values."""
        if self.plain or not self.chance(15):
            return
        expression, rows, dim = self.rng.choice(self.tables)
        fitting = [r for r in self.rows if r[1] == dim]
        made, stored = self.name("d"), expression.removeprefix("self.")
        self.read_otherwise.add(stored)
        self.dense.add(stored)
        if fitting:
            self.body.append(f"{made} = F.linear({self.rng.choice(fitting)[0]}, {expression})")
            self.rows.append((made, rows))
        else:
            name, width = self.rng.choice(self.rows)
            self.body.append(f"{made} = {name} * {expression}.pow(2).mean()")
            self.rows.append((made, width))
