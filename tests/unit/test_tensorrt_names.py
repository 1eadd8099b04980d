"""Every name of TensorRT that the worker uses is guarded on every version that lacks it; read from the source.

That the guards are needed, and that these tests see each of them, is shown by deleting them one at a time.
"""

import ast

import pytest
from doubles import tensorrt_names
from doubles.tensorrt_names import MODULE, VERSIONS, Use, lacking

FILES = tensorrt_names.files()
READERS = {path: tensorrt_names.read(path) for path in FILES}
USES = [use for reader in READERS.values() for use in reader.uses]
QUESTIONS = [question for reader in READERS.values() for question in reader.questions]
GUARDS = [(path, guard) for path, reader in READERS.items() for guard in reader.guards]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_name_that_a_version_lacks_is_guarded(version):
    found = [use for reader in READERS.values() for use in tensorrt_names.violations(reader, version)]
    assert not found, f"TensorRT {version} lacks: " + "; ".join(map(str, found))


def exists(use):
    try:
        return len(lacking(use.owner, use.name)) < len(VERSIONS)
    except KeyError:
        return False


def test_every_name_is_one_of_tensorrt():
    """A misspelt name that is guarded would never be used."""
    asked = [*QUESTIONS, *(guard for _, guard in GUARDS)]
    asked_for = [Use(each.file, 0, each.owner, each.name, True) for each in asked]
    assert not [str(use) for use in [*USES, *asked_for] if not exists(use)]


def test_nothing_is_used_of_which_it_is_not_known_what_it_is():
    assert not [text for reader in READERS.values() for text in reader.unknown]


def test_every_guard_is_needed():
    """A guard of a name that every version has would only hide mistakes."""
    assert not [str(guard) for _, guard in GUARDS if not lacking(guard.owner, guard.name)]


def test_only_bindings_imports_tensorrt():
    importing = [
        path for path in tensorrt_names.WORKER.rglob("*.py") if "tensorrt" in tensorrt_names.imports(path)
    ]
    assert [path.name for path in importing] == ["bindings.py"]


def test_the_names_are_seen():
    """The reading finds uses of each kind, so that an empty list of violations means something."""
    found = {f"{use.owner}.{use.name}" for use in USES}
    assert {
        f"{MODULE}.OnnxParser",
        "Builder.build_serialized_network",
        "BuilderFlag.FP16",
        "IBuilderConfig.max_workspace_size",
        "IBuilderConfig.set_timing_cache",
        "ICudaEngine.num_io_tensors",
        "IExecutionContext.execute_async_v3",
        "ILayer.precision",
        "INetworkDefinition.get_layer",
        "ITimingCache.combine",
        "ParserError.node_name",
        "Runtime.deserialize_cuda_engine",
    } <= found
    assert len(GUARDS) > 60


@pytest.mark.parametrize(("path", "guard"), GUARDS, ids=[str(guard) for _, guard in GUARDS])
def test_without_a_guard_each_version_that_lacks_the_name_is_red(path, guard):
    before, reader = READERS[path], tensorrt_names.read(path, tensorrt_names.without(path, guard))
    red = [version for version in VERSIONS if tensorrt_names.violations(reader, version)]
    assert red == lacking(guard.owner, guard.name)
    assert not any(tensorrt_names.violations(before, version) for version in VERSIONS)


@pytest.mark.parametrize(
    ("source", "owner_and_name"),
    [
        ("config.max_workspace_size = 1", "IBuilderConfig.max_workspace_size"),
        ("bindings.module().BuilderFlag.FP16", "BuilderFlag.FP16"),
        ("a = 1 if bindings.has(layer, 'precision') else layer.precision", "ILayer.precision"),
        ("if layer.metadata and bindings.has(layer, 'metadata'):\n  pass", "ILayer.metadata"),
        ("trt.IProgressMonitor", "tensorrt.IProgressMonitor"),
        ("if bindings.has(builder, 'max_threads'):\n  pass\nbuilder.max_threads = 1", "Builder.max_threads"),
        ("tensor.dtype = 1", "ITensor.dtype"),
        ("context.active_optimization_profile = 1", "IExecutionContext.active_optimization_profile"),
        ("functools.partial(context.execute_async_v3, 1)", "IExecutionContext.execute_async_v3"),
        ("[layer.metadata for layer in [network.get_layer(i) for i in range(9)]]", "ILayer.metadata"),
    ],
)
def test_a_use_without_its_guard_is_found(source, owner_and_name):
    reader = tensorrt_names.Reader("other")
    reader.visit(ast.parse(source))
    found = [use for version in VERSIONS for use in tensorrt_names.violations(reader, version)]
    assert {f"{use.owner}.{use.name}" for use in found} == {owner_and_name}
