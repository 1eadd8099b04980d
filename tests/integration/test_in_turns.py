"""Engines measured in turns on the loopback target, each run a job and a process of its own."""

import pytest
from doubles.chain import ChainWorkload, build_chain

from jetway.configs.schema import BenchmarkConfig, Target
from jetway.flows.in_turns import duel_engines
from jetway.tasks.duel import Budget
from jetway.tasks.stage import StageContext
from jetway.tasks.store import Store
from jetway.tasks.target.session import open_target
from jetway.tasks.verdict import LOOKS, Change

pytestmark = [pytest.mark.serial, pytest.mark.slow]


@pytest.fixture
def loopback(tmp_path):
    """A session on this machine and a context for chains, in a home of their own."""
    context = StageContext(ChainWorkload(), Store(tmp_path / "store"), threads=1)
    with open_target(Target(name="loopback", kind="loopback")) as session:
        yield context, session


def fight(loopback, champion, candidate, **budget):
    context, session = loopback
    engines = {
        "champion": build_chain(context, session, champion),
        "candidate": build_chain(context, session, candidate),
    }
    return duel_engines(context, session, engines, BenchmarkConfig(), budget=Budget(**budget))


@pytest.mark.parametrize(("layers", "change"), [(40, Change.SAME), (44, Change.REGRESSED)])
def test_chain_against_a_longer_one(layers, change, loopback):
    """A tenth more of work is found. On a disturbed machine too few runs are VALID, and that is UNKNOWN."""
    result = fight(loopback, 40, layers, minutes=5)
    if result.verdict.count < min(LOOKS):
        assert result.verdict.change is Change.UNKNOWN
        pytest.skip(f"{result.verdict.count} calm pairs in {len(result.runs)} runs")
    assert result.verdict.change is change
