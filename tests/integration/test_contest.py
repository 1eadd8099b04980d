"""The champion's engine on its target: found again where it still fits, built anew where the platform changed."""

from types import SimpleNamespace

import pytest
from doubles.chain import ChainWorkload, build_chain, chain_onnx

from jetway.configs.schema import BuildConfig, Target, TensorRtConfig
from jetway.flows.contest import champion_engine, is_same_file
from jetway.tasks.stage import StageContext
from jetway.tasks.store import Store
from jetway.tasks.target.session import open_target

pytestmark = pytest.mark.team

LAYERS = 2


@pytest.fixture
def loopback(tmp_path):
    """A session on this machine, a context for chains, and a chain's engine there."""
    context = StageContext(ChainWorkload(), Store(tmp_path / "store"), threads=1)
    with open_target(Target(name="loopback", kind="loopback")) as session:
        yield context, session, build_chain(context, session, LAYERS)


def contest_of(context, engine):
    """A champion whose record says that this was its engine."""
    recipe = SimpleNamespace(build=BuildConfig(threads=1), tensorrt=TensorRtConfig())
    model = chain_onnx(context.store, LAYERS)
    holder = SimpleNamespace(
        engine=lambda row: engine, model=lambda row: model, recipe=recipe, context=context
    )
    return SimpleNamespace(holder=holder, held=SimpleNamespace(variant="baseline-fp32"))


def test_champion_that_fits_is_used_as_it_is(loopback):
    context, session, engine = loopback
    found, notes = champion_engine(contest_of(context, engine), session)
    assert notes == ()
    assert found.metadata["reused"]
    assert is_same_file(found, engine)


def test_champion_of_another_runtime_is_built_anew_and_told(loopback):
    context, session, engine = loopback
    platform = engine.metadata["platform"]
    metadata = engine.metadata | {"platform": platform | {"engine_version": "0.1"}}
    recorded = engine.model_copy(update={"sha256": "0" * 64, "metadata": metadata})
    found, (note,) = champion_engine(contest_of(context, recorded), session)
    assert found == engine
    assert note == (
        "the champion's engine was built anew from its ONNX file: "
        f"engine_version was 0.1 and is {platform['engine_version']}"
    )


def test_engines_that_are_loaded_otherwise_are_not_the_same(loopback):
    _, _, engine = loopback
    moved = engine.model_copy(update={"metadata": engine.metadata | {"remote_path": "elsewhere"}})
    assert not is_same_file(moved, engine)
