"""Imports point one way: flows → stages → shared → values → schema and errors."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGES = {
    "load", "analyze", "prune", "finetune", "qat", "sensitivity", "calibrate", "export", "lower", "verify",
    "preflight", "build", "benchmark", "stream", "cascade", "evaluate", "compare", "package",
}  # fmt: skip
VALUES = {"artifacts", "metrics"}
HOMES = {
    "mlflow": ("tasks/tracking",),
    "fabric": ("tasks/target/",),
    "paramiko": ("tasks/target/",),
    "asyncssh": ("tasks/target/",),
    "tensorrt": ("tasks/on_device/",),
}


def sources():
    paths = [p for top in ("flows", "tasks", "configs", "data") for p in (ROOT / top).rglob("*.py")]
    return sorted(path.relative_to(ROOT) for path in paths)


@functools.cache
def imported_modules(path):
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # "from package import module" names a module too
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer_of(module):
    """Rank of a jetway module; a module may import lower ranks and, outside stages, its own."""
    parts = module.split(".")[1:]
    if parts[0] == "flows":
        return 5
    if parts[:2] in (["tasks", "on_device"], ["tasks", "package_files"]):
        return 0
    if parts[0] == "configs" or parts[:2] == ["tasks", "errors"]:
        return 1
    if parts[0] == "tasks" and len(parts) > 1 and parts[1] in VALUES:
        return 2
    if parts[0] == "tasks" and len(parts) > 1 and parts[1] in STAGES:
        return 4
    return 3


def module_name(path):
    return "jetway." + ".".join(path.with_suffix("").parts)


@pytest.mark.parametrize("path", sources(), ids=str)
def test_imports_point_one_way(path):
    own = module_name(path)
    for imported in imported_modules(path):
        if not imported.startswith("jetway."):
            continue
        mine, theirs = layer_of(own), layer_of(imported)
        if mine == 0:
            assert imported.startswith("jetway.tasks.on_device"), f"{path} imports {imported}"
        elif theirs == 0:
            raise AssertionError(
                f"{path} imports {imported}: what runs on the target is reached over SSH only"
            )
        elif mine == 4 and theirs == 4:
            stage = imported.split(".")[2]
            assert stage == own.split(".")[2], f"{path} imports the stage {imported}"
        else:
            assert theirs <= mine, f"{path} imports {imported}, which is above it"


@pytest.mark.parametrize(("package", "homes"), HOMES.items(), ids=HOMES.keys())
def test_vendor_package_has_one_home(package, homes):
    for path in sources():
        if path.as_posix().startswith(homes):
            continue
        assert package not in {name.split(".")[0] for name in imported_modules(path)}, (
            f"{path} imports {package}"
        )


def test_every_package_is_installed():
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {module_name(path.parent) for path in sources() if path.name == "__init__.py"}
    assert found == listed
