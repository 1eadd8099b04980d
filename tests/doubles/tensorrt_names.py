"""Which names of TensorRT the worker uses, where, and behind which guards: read from its source, not by running it.

The rule that it reads by is at the top of tasks/on_device/tensorrt_engine/bindings.py. What an expression is follows
from assignments, from what TensorRT's calls return (RETURNS), and for parameters and fields from their names, which
the worker keeps to (INSTANCES).
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import doubles

WORKER = Path(__file__).parents[2] / "tasks" / "on_device"
SURFACE = doubles.surface()
VERSIONS = list(SURFACE["Builder"])
MODULE = "tensorrt"
#: Names of the module that are no class and no enum; every version has them.
FUNCTIONS = {"__version__", "init_libnvinfer_plugins", "volume", "nptype"}
PYTHON = {"__members__", "__init__"}

#: What a parameter or a field of that name is, leading underscores apart; a file's own comes first.
INSTANCES = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "engine": "ICudaEngine",
    "inspector": "EngineInspector",
    "layer": "ILayer",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "runtime": "Runtime",
    "tensor": "ITensor",
    "trt": MODULE,
}
OURS = "ours"
OWN_INSTANCES = {
    ("calibration", "runtime"): OURS,
    ("execution", "cuda"): OURS,
    ("execution", "lane"): OURS,
    ("execution", "tensor"): OURS,
    ("io_tensors", "tensor"): OURS,
    ("calibration", "native"): "IInt8Calibrator",
    ("parser", "error"): "ParserError",
    ("profiles", "native"): "IOptimizationProfile",
    ("timing_cache", "native"): "ITimingCache",
    ("timing_cache", "other"): "ITimingCache",
}
RETURNS = {
    "Builder.create_builder_config": "IBuilderConfig",
    "Builder.create_network": "INetworkDefinition",
    "Builder.create_optimization_profile": "IOptimizationProfile",
    "Builder.build_serialized_network": "IHostMemory",
    "IBuilderConfig.create_timing_cache": "ITimingCache",
    "IBuilderConfig.get_timing_cache": "ITimingCache",
    "ICudaEngine.create_engine_inspector": "EngineInspector",
    "ICudaEngine.create_execution_context": "IExecutionContext",
    "INetworkDefinition.get_layer": "ILayer",
    "INetworkDefinition.get_input": "ITensor",
    "INetworkDefinition.get_output": "ITensor",
    "ILayer.get_input": "ITensor",
    "ILayer.get_output": "ITensor",
    "OnnxParser.get_error": "ParserError",
    "Runtime.deserialize_cuda_engine": "ICudaEngine",
}
#: Classes whose names others have too.
BASES = {
    "Logger": "ILogger",
    "IInt8EntropyCalibrator2": "IInt8Calibrator",
    "IInt8MinMaxCalibrator": "IInt8Calibrator",
}


class Use(NamedTuple):
    """A name that the worker uses: ``owner`` is a class, an enum, or the module."""

    file: str
    line: int
    owner: str
    name: str
    #: Behind a guard, or asked for by ``bindings.member``.
    guarded: bool
    #: Where it is called, or bound to arguments by functools.partial; None where it is read or set.
    call: ast.Call | None = None
    stored: bool = False

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.owner}.{self.name}"


class Guard(NamedTuple):
    """A call of ``bindings.has`` or ``bindings.member`` with the name that it asks for."""

    file: str
    owner: str
    name: str
    node: ast.Call

    def __str__(self) -> str:
        return f"{self.file}:{self.node.lineno}: {self.owner}.{self.name}"


def state(owner: str, name: str, version: str) -> str:
    """As in the table of the surface: ``-`` where the version lacks the name. Raises KeyError for what none has."""
    if owner == MODULE:
        return "x" if name in FUNCTIONS else SURFACE[name][version]
    if name in PYTHON:
        return SURFACE[owner][version]
    while f"{owner}.{name}" not in SURFACE and owner in BASES:
        owner = BASES[owner]
    return SURFACE[f"{owner}.{name}"][version]


def lacking(owner: str, name: str) -> list[str]:
    return [version for version in VERSIONS if state(owner, name, version) == "-"]


def files() -> list[Path]:
    """The worker's files that may use a name: the engine's package but ``bindings``, and what imports that."""
    found = [path for path in sorted(WORKER.rglob("*.py")) if path.stem not in ("bindings", "__init__")]
    return [path for path in found if path.parent.name == "tensorrt_engine" or "bindings" in imports(path)]


def imports(path: Path) -> set[str]:
    """Names of what a file imports, modules by their first part."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.update(alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def read(path: Path, tree: ast.Module | None = None) -> "Reader":
    """The uses and guards of a file, or of a changed tree of it."""
    reader = Reader(path.stem)
    reader.visit(tree or ast.parse(path.read_text()))
    return reader


def called(node: ast.AST, name: str) -> bool:
    """Whether it is a call of that function of ``bindings``."""
    function = node.func if isinstance(node, ast.Call) else None
    return isinstance(function, ast.Attribute) and ast.unparse(function) == f"bindings.{name}"


def literal(node: ast.expr) -> str:
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        raise ValueError(
            f"line {node.lineno}: a guard names what it guards by a literal, not {ast.unparse(node)}"
        )
    return node.value


class Reader(ast.NodeVisitor):
    """Walks one file. ``questions`` are names that it asks about and does not use behind the answer; ``unknown`` are
    attributes that TensorRT partly has, of expressions that nothing is known of."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.uses: list[Use] = []
        self.guards: list[Guard] = []
        self.questions: list[Guard] = []
        self._tests: list[ast.expr] = []
        self.unknown: list[str] = []
        self._active: list[set[tuple[str, str]]] = [set()]
        self._locals: list[dict[str, str | None]] = [{}]
        self._call: ast.Call | None = None

    # What an expression is: the module, "type X", a class for an object of it, or None

    def kind(self, node: ast.expr) -> str | None:
        if called(node, "module"):
            return MODULE
        if isinstance(node, ast.Name):
            return self._named(node.id)
        if isinstance(node, ast.Attribute):
            return self._attribute(node)
        if isinstance(node, ast.Call):
            return self._returned(node)
        return None

    def _named(self, name: str) -> str | None:
        for scope in reversed(self._locals):
            if name in scope:
                return scope[name]
        return self._by_convention(name)

    def _by_convention(self, name: str) -> str | None:
        """A parameter's or a field's."""
        plain = name.lstrip("_")
        return OWN_INSTANCES.get((self.file, plain), INSTANCES.get(plain))

    def _attribute(self, node: ast.Attribute) -> str | None:
        owner = self.kind(node.value)
        if owner == MODULE and node.attr not in FUNCTIONS:
            return f"type {node.attr}"
        return self._by_convention(node.attr) if owner in (None, OURS) else None

    def _returned(self, node: ast.Call) -> str | None:
        if isinstance(node.func, ast.Attribute):
            owner = self.kind(node.func.value)
            if f"{owner}.{node.func.attr}" in RETURNS:
                return RETURNS[f"{owner}.{node.func.attr}"]
        made = self.kind(node.func)
        return made.removeprefix("type ") if made and made.startswith("type ") else None

    # Scopes

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self._locals[-1].update({alias.asname or alias.name: OURS for alias in node.names})

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        arguments = [*node.args.args, *node.args.kwonlyargs]
        given = {each.arg: self._by_convention(each.arg) for each in arguments if each.arg not in ("self",)}
        self._scoped(node, given)

    def _scoped(self, node: ast.AST, names: dict[str, str | None]) -> None:
        self._locals.append(names)
        self.generic_visit(node)
        self._locals.pop()

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            if isinstance(target, ast.Name):
                found = self.kind(node.value) or self._items(node.value)
                self._locals[-1][target.id] = found or self._by_convention(target.id)

    def _items(self, node: ast.expr) -> str | None:
        """What a comprehension's items are: a list of layers is walked as one."""
        if isinstance(node, ast.ListComp | ast.GeneratorExp):
            return self.kind(node.elt)
        if isinstance(node, ast.IfExp):
            return self._items(node.body)
        return None

    def visit_For(self, node: ast.For) -> None:
        self._bind(node.target, node.iter)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._bind(node.target, node.iter)
        self.generic_visit(node)

    def _bind(self, target: ast.expr, items: ast.expr) -> None:
        if (
            isinstance(items, ast.Call)
            and ast.unparse(items.func) == "enumerate"
            and isinstance(target, ast.Tuple)
        ):
            target, items = target.elts[1], items.args[0]
        if isinstance(target, ast.Name):
            self._locals[-1][target.id] = self.kind(items) or self._by_convention(target.id)

    def visit_ListComp(self, node: ast.ListComp) -> None:
        self._comprehension(node)

    def visit_SetComp(self, node: ast.SetComp) -> None:
        self._comprehension(node)

    def visit_GeneratorExp(self, node: ast.GeneratorExp) -> None:
        self._comprehension(node)

    def visit_DictComp(self, node: ast.DictComp) -> None:
        self._comprehension(node)

    def _comprehension(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> None:
        self._locals.append({})
        for generator in node.generators:
            self.visit(generator)
        for field in ("elt", "key", "value"):
            if hasattr(node, field):
                self.visit(getattr(node, field))
        self._locals.pop()

    # Guards

    def visit_If(self, node: ast.If) -> None:
        self._behind(node.test, node.body)
        for statement in node.orelse:
            self.visit(statement)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._behind(node.test, [node.body])
        self.visit(node.orelse)

    def _behind(self, test: ast.expr, body: list[ast.stmt] | list[ast.expr]) -> None:
        granted = set(self._granted(test))
        self.visit(test)
        self._active.append(self._active[-1] | granted)
        for each in body:
            self.visit(each)
        self._active.pop()

    def _granted(self, test: ast.expr) -> Iterator[tuple[str, str]]:
        if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
            for value in test.values:
                yield from self._granted(value)
        if called(test, "has"):
            assert isinstance(test, ast.Call)
            self._tests.append(test)
            yield self._owner(test.args[0]), literal(test.args[1])

    def _owner(self, node: ast.expr) -> str:
        owner = self.kind(node)
        if owner is None:
            raise ValueError(f"{self.file}:{node.lineno}: nothing says what {ast.unparse(node)} is")
        return owner.removeprefix("type ")

    # Uses

    def visit_Call(self, node: ast.Call) -> None:
        if called(node, "has"):
            asked = Guard(self.file, self._owner(node.args[0]), literal(node.args[1]), node)
            (self.guards if node in self._tests else self.questions).append(asked)
        if called(node, "member"):
            enum, name = literal(node.args[0]), literal(node.args[1])
            self.guards.append(Guard(self.file, enum, name, node))
            self.uses.append(Use(self.file, node.lineno, enum, name, True))
        if ast.unparse(node.func) == "functools.partial":
            self.visit_Call(ast.copy_location(ast.Call(node.args[0], node.args[1:], node.keywords), node))
            return
        if isinstance(node.func, ast.Attribute):
            self._note(node.func, node)
            self.visit(node.func.value)
        else:
            self.visit(node.func)
        for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
            self.visit(argument)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._note(node, None)
        self.visit(node.value)

    def _note(self, node: ast.Attribute, call: ast.Call | None) -> None:
        owner = self.kind(node.value)
        if owner is None and node.attr in PARTLY_THERE and not is_own(node.value):
            self.unknown.append(f"{self.file}:{node.lineno}: {ast.unparse(node)}")
        if owner in (None, OURS):
            return
        owner = owner.removeprefix("type ")
        guarded = (owner, node.attr) in self._active[-1]
        stored = isinstance(node.ctx, ast.Store)
        self.uses.append(Use(self.file, node.lineno, owner, node.attr, guarded, call, stored))


def is_own(node: ast.expr) -> bool:
    """Whether it is the worker's own: ``self``, a module's function, a text."""
    return isinstance(node, ast.Constant) or (isinstance(node, ast.Name) and node.id in ("self", "bindings"))


#: Names that a class which the worker knows has in some versions only; those of Python's containers mean these.
OWNERS = {owner for owner in [*INSTANCES.values(), *OWN_INSTANCES.values(), *RETURNS.values()] if owner}
PARTLY_THERE = {
    name.split(".")[-1]
    for name, states in SURFACE.items()
    if name.rpartition(".")[0] in OWNERS and "-" in states.values()
} - set(dir(dict))


def violations(reader: Reader, version: str) -> list[Use]:
    """Uses without a guard of names that the version lacks, and what is set that it lets only be read."""
    found = []
    for use in reader.uses:
        there = state(use.owner, use.name, version)
        if (there == "-" and not use.guarded) or (there == "ro" and use.stored):
            found.append(use)
    return found


class Unguarded(ast.NodeTransformer):
    """Deletes one guard: a test for it becomes True, and a member is taken from its enum directly."""

    def __init__(self, guard: Guard) -> None:
        self.place = (guard.node.lineno, guard.node.col_offset)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if (node.lineno, node.col_offset) != self.place:
            return node
        if called(node, "has"):
            return ast.copy_location(ast.Constant(True), node)
        if called(node, "member"):
            source = f"bindings.module().{literal(node.args[0])}.{literal(node.args[1])}"
            direct = ast.parse(source, mode="eval").body
            return ast.fix_missing_locations(ast.copy_location(direct, node))
        return node


def without(path: Path, guard: Guard) -> ast.Module:
    """The file's tree without that guard."""
    return ast.fix_missing_locations(Unguarded(guard).visit(ast.parse(path.read_text())))
