"""The names of a version: what the double's modules have beyond them is taken away, what they lack is named."""

import os

from tensorrt import _native

DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../../data/tensorrt_api/surface.tsv")


def _read():
    """Versions, and ``{owner: {member: (kind, history)}}``; the owner of a class or an enum is empty."""
    versions, found = [], {}
    with open(DATA) as file:
        for line in file:
            if line.startswith("# Versions:"):
                versions = line.split()[2:]
            if not line.startswith("#"):
                name, kind, history, _ = line.rstrip("\n").split("\t")
                parent, _, member = name.rpartition(".")
                found.setdefault(parent, {})[member] = (kind, history)
                if kind in ("class", "enum"):
                    found.setdefault("", {})[name] = (kind, history)
    return versions, found


VERSIONS, _NAMES = _read()


def members_of(owner, version):
    """``{member: (kind, state)}`` of a class or enum in that version."""
    members = {
        name: (kind, _state(history, version)) for name, (kind, history) in _NAMES.get(owner, {}).items()
    }
    return {name: member for name, member in members.items() if member[1] != "-"}


def _state(history, version):
    state = "-"
    for change in history.split():
        since, _, becomes = change.partition(":")
        if VERSIONS.index(since) <= VERSIONS.index(version):
            state = becomes
    return state


def enum_values(name, version):
    return {member: int(state) for member, (_, state) in members_of(name, version).items()}


def publish(namespace, version, modules):
    """Puts the classes of ``modules`` into ``namespace``, cut to the surface of the version."""
    implemented = {}
    for module in modules:
        implemented.update({name: value for name, value in vars(module).items() if isinstance(value, type)})
    for name, (kind, _) in members_of("", version).items():
        if "." in name:
            continue
        if kind == "enum":
            namespace[name] = implemented.get(name) or _native.make_enum(name, enum_values(name, version))
        else:
            namespace[name] = implemented.get(name) or _native.make_class(name)
            _cut(namespace[name], members_of(name, version))


def _cut(owner, members):
    for name in [name for name in vars(owner) if not name.startswith("_") and name not in members]:
        delattr(owner, name)
    for name, (kind, state) in members.items():
        if not hasattr(owner, name):
            setattr(owner, name, _native.placeholder(owner.__name__ + "." + name, kind, state))
        elif state == "ro" and isinstance(vars(owner).get(name), property):
            setattr(owner, name, property(vars(owner)[name].fget))
