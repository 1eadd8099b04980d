"""A double of NVIDIA's TensorRT Python bindings, for tests: it builds nothing and needs no GPU.

``TENSORRT_DOUBLE_VERSION`` says which version it stands for, such as 8.2.1.8. The names that the module, its
classes and enums have are those of that version, no more and no less (tests/data/tensorrt_api/surface.tsv); a
name that the double has but does not act out raises NotImplementedError when used. It acts out the rules that
the worker lives with: which flags go with which network, None instead of an exception, callbacks from another
thread, pointers that nobody keeps alive, engines that fit one version and one GPU.

An "engine" holds the ONNX file, and running it gives what ONNX Runtime gives on the CPU, or where that cannot be
imported a pattern made from the inputs. So a test through the double proves the worker's plumbing on that version's
surface; it never shows that TensorRT builds the network, nor how fast or exact it is. ``IS_DOUBLE`` is True, and
what it "builds" begins with b"TENSORRT DOUBLE".

Other variables: ``TENSORRT_DOUBLE_FAULT`` (see ``_settings``), ``TENSORRT_DOUBLE_DLA_CORES`` (0),
``TENSORRT_DOUBLE_KERNEL_MS`` (an execution lasts at least that long), ``TENSORRT_DOUBLE_COMPUTE=pattern`` (never
ONNX Runtime), ``CUDART_DOUBLE_COMPUTE_CAPABILITY`` (8.7). Executing needs the double of the CUDA runtime in the
process, compiled from cudart_double.c.
"""

from tensorrt import _builder, _config, _engine, _extensions, _network, _settings, _surface, _values

IS_DOUBLE = True
__version__ = _settings.VERSION

_surface.publish(
    globals(), _settings.SURFACE_VERSION, (_values, _extensions, _network, _config, _builder, _engine)
)


def volume(iterable):
    product = 1
    for size in iterable:
        product *= size
    return product


def init_libnvinfer_plugins(logger, namespace):
    return True


for _name, _member in _values.DATA_TYPE_ALIASES.items():
    if hasattr(globals()["DataType"], _member):
        globals()[_name] = getattr(globals()["DataType"], _member)


def nptype(trt_type):
    """The numpy type. In 8.x up to 8.5 it touches ``np.bool``, which numpy 1.24 removed and 2.0 brought back."""
    import numpy

    if trt_type.name == "BOOL":
        return numpy.bool if _settings.at_most(8, 5) else numpy.bool_
    if trt_type.name not in _values.NUMPY_NAMES:
        raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
    return getattr(numpy, _values.NUMPY_NAMES[trt_type.name])
