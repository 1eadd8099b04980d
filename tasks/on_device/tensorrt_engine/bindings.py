"""The only file that imports tensorrt, and the rule by which its names are used.

TensorRT's numbers move between versions and its names come and go, so what a version can do is asked by name, never
by version or number. The rule, which a test holds every file of this package to:

1.  A name that every version from 8.0.1 to 11.4 has is used plainly: ``config.set_flag(...)``, ``trt.Builder``.
    ``trt`` is the local name of what ``module()`` returns.
2.  A method, property or module attribute that some version lacks is used inside the true branch of an ``if`` (or
    of ``a if test else b``) whose test is, or joins with ``and``, the guard ``bindings.has(OWNER, "NAME")``, with
    the same NAME as a literal. The false branch never uses it, and no early return stands for a guard::

        if bindings.has(config, "set_memory_pool_limit"):
            config.set_memory_pool_limit(...)
        elif bindings.has(config, "max_workspace_size"):
            config.max_workspace_size = ...

3.  A member of an enum that some version lacks, or whose enum some version lacks, comes from
    ``bindings.member("ENUM", "NAME")``, both literal, which is None where it is absent; it is used behind a test
    against None, or behind the guard of rule 2 for a method that came with it.
4.  A name that a recipe gives (a tactic source) comes from ``bindings.named("ENUM", name)``, None likewise, of an
    enum that every version has.
5.  A class of callbacks is a subclass made in a function, of a class that every version has or behind rule 2.
    Its ``__init__`` calls that of the base by name, and whoever hands the object to TensorRT keeps it.

``has`` looks at the class of an object, as asking the object would run a property's getter.
"""

from types import ModuleType
from typing import Any, Optional

from jetway.tasks.on_device import errors
from jetway.tasks.on_device.errors import DeviceError


def module() -> Any:
    """The tensorrt module. Raises DeviceError (mismatch) with the reason when it cannot be imported."""
    try:
        import tensorrt
    except Exception as exc:  # a broken installation raises whatever it likes
        raise DeviceError(
            "This Python cannot import tensorrt: {}: {}. Install it there (on a Jetson it comes with JetPack, for "
            "the system's own Python), or name another interpreter in the target's `python`.".format(
                type(exc).__name__, exc
            ),
            errors.MISMATCH,
        )
    return tensorrt


def is_double() -> bool:
    """Whether this is the double that tests use: it builds nothing, and what it gives must say so."""
    return bool(getattr(module(), "IS_DOUBLE", False))


def has(owner: Any, name: str) -> bool:
    """Whether this version has the attribute; ``owner`` is the module, a class, or an object of a class."""
    return hasattr(owner if isinstance(owner, (ModuleType, type)) else type(owner), name)


def member(enum: str, name: str) -> Optional[Any]:
    """The member of one of TensorRT's enums, or None where this version lacks it."""
    return getattr(getattr(module(), enum, None), name, None)


def named(enum: str, name: str) -> Optional[Any]:
    """The same for a name that comes from a recipe."""
    return member(enum, name) if name.isupper() else None


def absent(what: str, key: str, advice: str) -> DeviceError:
    """The error for something that the recipe asks for and this version has not."""
    return DeviceError(
        "{}: TensorRT {} on this target has no {}. {}".format(key, module().__version__, what, advice),
        errors.MISMATCH,
    )
