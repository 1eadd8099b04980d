"""Writes what a tensorrt module is as JSON: run with the module's name, for the real bindings and for the double.

For each class: its bases, and of what it declares itself methods with the parameters of each overload, properties
(rw or ro) and values; for each enum: the number of each value. A method that the double does not act out has none.
"""

import importlib
import inspect
import json
import re
import sys


def main() -> None:
    module = importlib.import_module(sys.argv[1])
    classes = {name: value for name, value in vars(module).items() if isinstance(value, type)}
    found = {name: describe(value) for name, value in classes.items() if not name.startswith("_")}
    json.dump({"version": module.__version__, "names": found}, sys.stdout)


def describe(cls: type) -> dict[str, object]:
    if hasattr(cls, "__members__"):
        return {"kind": "enum", "values": {name: int(value) for name, value in cls.__members__.items()}}
    members = {name: member(cls, name) for name in vars(cls) if not name.startswith("_")}
    bases = [base.__name__ for base in cls.__mro__[1:]]
    return {"kind": "class", "members": members, "bases": bases, "overloads": overloads(cls.__init__)}


def member(cls: type, name: str) -> dict[str, object]:
    value = inspect.getattr_static(cls, name)
    if isinstance(value, property) or inspect.isdatadescriptor(value):
        return {"kind": "property", "state": "rw" if getattr(value, "fset", None) else "ro"}
    if callable(value) and not isinstance(value, type):
        return {"kind": "method", "overloads": overloads(value)}
    return {"kind": "constant"}


def overloads(function: object) -> list[list[tuple[str, bool]]]:
    """Name of each parameter, and whether it may be left out; from pybind11's docstring, or from Python."""
    if inspect.isfunction(function):
        given = inspect.signature(function).parameters.values()
        return [[(each.name, each.default is not each.empty) for each in given if each.name != "self"]]
    lines = (getattr(function, "__doc__", None) or "").splitlines()
    return [parsed(line) for line in lines if ") -> " in line and "*args" not in line]


def parsed(line: str) -> list[tuple[str, bool]]:
    """Of ``1. parse(self: OnnxParser, model: buffer, path: str = None) -> bool``."""
    inside = line[line.index("(") + 1 : line.rindex(") -> ")]
    parts = re.split(r",\s*(?=\w+:)", inside) if inside else []
    return [(part.split(":")[0], " = " in part) for part in parts if not part.startswith("self:")]


main()
