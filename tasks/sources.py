"""A user's source files: finding them before anything is imported, naming a line of them, and their digests."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from jetway.configs.schema import WorkloadConfig
from jetway.tasks.errors import ConfigError

#: Of Jetway itself, only these depend on a workload; the stages' own revisions stand for the rest.
_OWN_PACKAGES = ("jetway.data", "jetway.tasks.workloads")
_INSTALLED = frozenset({"site-packages", "dist-packages"})


def find_workload(config: WorkloadConfig, *, search_path: Sequence[Path] = ()) -> None:
    """Puts ``search_path`` first and looks for the workload's module, of which only its parents are imported.

    Raises ConfigError when there is no such module.
    """
    with_path(search_path)
    name = config.class_path.partition(":")[0]
    importlib.invalidate_caches()
    try:
        found, reason = name in sys.modules or importlib.util.find_spec(name) is not None, ""
    except ModuleNotFoundError as exc:
        found, reason = False, f" ({exc})"
    except Exception as exc:
        raise ConfigError(
            f"workload.class_path: the package of {name!r} fails while it is imported: {describe_error(exc)}."
        ) from exc
    if not found:
        raise ConfigError(
            f"workload.class_path: cannot import {name!r}{reason}. Looked in "
            f"{', '.join(str(path) for path in search_path) or 'the installed packages'}. "
            "Run jetway from the folder that holds the package, or install it."
        )


def with_path(search_path: Sequence[Path]) -> None:
    for folder in reversed(search_path):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))


def describe_error(exc: Exception) -> str:
    """Kind, text, file and line of an error in a user's code."""
    text = f"{type(exc).__name__}: {exc.msg if isinstance(exc, SyntaxError) else exc}"
    place = (exc.filename, exc.lineno) if isinstance(exc, SyntaxError) else _place(exc)
    return f"{text} ({place[0]}, line {place[1]})"


def _place(exc: Exception) -> tuple[str, int | None]:
    """Where the error was raised: in the innermost file that is not an installed package's or Python's."""
    frames = traceback.extract_tb(exc.__traceback__)
    theirs = [frame for frame in frames if _is_project_file(Path(frame.filename))]
    frame = (theirs or frames)[-1]
    return frame.filename, frame.lineno


def _is_project_file(path: Path) -> bool:
    library = Path(ast.__file__).parent
    return path.is_file() and not _INSTALLED & set(path.parts) and library not in path.parents


def source_digests(module: str) -> dict[str, str]:
    """SHA-256 of the source of ``module`` and of what it imports from its own project, by module name.

    Imports are read from the source text, those inside functions too, and followed through the files below
    the folder that holds the module's top-level package; of installed packages, only the module's own. So the
    result depends on the files alone, not on what else this process has imported. What is loaded by a
    computed name is not seen.
    """
    root = _root(module)
    sources: dict[str, bytes] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _source_file(name, root, module.partition(".")[0])
        if name in sources or path is None:
            continue
        sources[name] = path.read_bytes()
        waiting += [*_imports(name, path, sources[name]), *_parents(name)]
    return {name: hashlib.sha256(sources[name]).hexdigest() for name in sorted(sources)}


def _root(module: str) -> Path:
    """The folder in which the module's top-level package, or the module itself, lies."""
    path = Path(str(sys.modules[module].__file__)).absolute()
    levels = module.count(".") + (path.name == "__init__.py")
    return path.parents[levels]


def _source_file(name: str, root: Path, top: str) -> Path | None:
    if name.partition(".")[0] == "jetway":
        return _own_source_file(name)
    if _INSTALLED & set(root.parts) and name.partition(".")[0] != top:
        return None
    path = root.joinpath(*name.split("."))
    candidates = (path / "__init__.py", path.with_name(f"{path.name}.py"))
    return next((file for file in candidates if file.is_file()), None)


def _own_source_file(name: str) -> Path | None:
    """Jetway's folders need not lie under one folder of its name, so the import system says where."""
    if not any(f"{name}.".startswith(f"{package}.") for package in _OWN_PACKAGES):
        return None
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec and spec.origin else None


def _imports(name: str, path: Path, source: bytes) -> Iterator[str]:
    """Names that the source may import: of ``from a import b``, both ``a`` and ``a.b``."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(_parsed(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(package, node.level, node.module or "")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names if alias.name != "*")


def _parsed(source: bytes) -> ast.AST:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError):
        # It may be for another Python and imported under a condition; its own bytes still count.
        return ast.Module(body=[], type_ignores=[])


def _absolute(package: str, level: int, module: str) -> str:
    if level == 0:
        return module
    parts = package.split(".")[: len(package.split(".")) - level + 1]
    return ".".join([*parts, module] if module else parts)


def _parents(name: str) -> Iterator[str]:
    """Packages whose __init__ runs when the module is imported."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
