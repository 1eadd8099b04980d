"""What the classes of the double share with those that pybind11 makes: no attribute but the declared ones, no
constructor but the declared ones, a base ``__init__`` that must be called, enums that are no integers."""

import os
import sys
import weakref


class NativeType(type):
    """Checks, after construction, that the base ``__init__`` was called where there is one."""

    def __call__(cls, *arguments, **keywords):
        made = super().__call__(*arguments, **keywords)
        if cls._must_call_init and "_initialized" not in vars(made):
            name = next(base.__name__ for base in cls.__mro__ if base.__module__.startswith("tensorrt."))
            raise TypeError(f"tensorrt.tensorrt.{name}.__init__() must be called when overriding __init__")
        return made


class Native(metaclass=NativeType):
    """A class of the bindings. Objects take no attribute that the version does not declare."""

    _must_call_init = False
    _constructible = False

    def __init__(self):
        if not self._constructible:
            raise TypeError(f"tensorrt.tensorrt.{type(self).__name__}: No constructor defined!")
        self._initialized = True

    @classmethod
    def _make(cls, **fields):
        """How TensorRT itself makes an object of a class without a constructor."""
        made = cls.__new__(cls)
        vars(made).update(fields)
        return made

    def __setattr__(self, name, value):
        declared = getattr(type(self), name, None)
        if isinstance(declared, property) or name.startswith("_") or not _is_native(type(self)):
            object.__setattr__(self, name, value)
        else:
            raise AttributeError(
                f"'tensorrt.tensorrt.{type(self).__name__}' object has no attribute {name!r}"
            )


def _is_native(cls):
    return cls.__module__.split(".")[0] == "tensorrt"


def make_class(name):
    return NativeType(name, (Native,), {"__module__": "tensorrt.tensorrt", "__doc__": "A double."})


def placeholder(name, kind, state):
    """A name that this version has and the double does not act out."""

    def use(*_, **__):
        raise NotImplementedError(f"The double of TensorRT does not act out {name}.")

    if kind == "property":
        return property(use, use if state == "rw" else None)
    return use


class Enum:
    """An enum as pybind11 makes it: equal to its own kind alone, no arithmetic."""

    __members__ = {}

    def __init__(self, value):
        self.value = value

    @property
    def name(self):
        for name, member in self.__members__.items():
            if member.value == self.value:
                return name
        return "???"

    def __int__(self):
        return self.value

    def __index__(self):
        return self.value

    def __eq__(self, other):
        return type(other) is type(self) and other.value == self.value

    def __hash__(self):
        return hash(self.value)

    def __repr__(self):
        return f"<{type(self).__name__}.{self.name}: {self.value}>"

    def __str__(self):
        return f"{type(self).__name__}.{self.name}"


def make_enum(name, values):
    """An enum class with its members, ``{name: value}``."""
    made = type(name, (Enum,), {"__module__": "tensorrt.tensorrt", "__members__": {}})
    for member, value in sorted(values.items(), key=lambda item: (item[1], item[0])):
        made.__members__[member] = made(value)
        setattr(made, member, made.__members__[member])
    return made


def require(value, kind, call):
    """As pybind11 does, refuses an argument of another type."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"{call}(): incompatible function arguments: {value!r} is no {kind.__name__}")


def pointer_to(owned):
    """What C++ keeps of a Python object: a pointer, which does not keep it alive. (Newer bindings do so for some;
    TensorRT's documents tell the caller to, and the double insists.)"""
    return None if owned is None else weakref.ref(owned)


def follow(pointer):
    """The object behind a pointer. One that is gone would be a crash in TensorRT, and is one here."""
    if pointer is None:
        return None
    owned = pointer()
    if owned is None:
        sys.stderr.write(
            "TENSORRT DOUBLE: a callback object was garbage-collected while TensorRT holds a pointer to it. "
            "Keep a reference to the logger, profiler, progress monitor or calibrator.\n"
        )
        sys.stderr.flush()
        os.abort()
    return owned


def call_back(owned, method, *arguments):
    """Calls a method that Python overrides; what it raises is printed and lost, and None comes back."""
    try:
        return getattr(owned, method)(*arguments)
    except Exception as exc:
        sys.stderr.write(f"[ERROR] Exception caught in {method}(): {exc}\n")
        sys.stderr.flush()
        return None
