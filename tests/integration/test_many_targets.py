"""Eight targets take hardly longer than one, whose run takes about a minute. Their engines only wait, so this shows
orchestration, and no speed; each costs this machine a few processes for every job, and both sides of its SSH."""

import time

import pytest
import yaml
from doubles.fake_jetson.target import FakeJetson

pytest_plugins = ["doubles.fake_jetson.fixtures"]
pytestmark = [pytest.mark.serial, pytest.mark.slow, pytest.mark.filterwarnings("default")]

COUNT = 8
# Long, as TensorRT's double spends a few milliseconds of this machine's CPU on each query.
KERNEL_MS = 50
LONGEST_RATIO = 1.5


@pytest.fixture
def boards(tmp_path_factory, jetson_project):
    """Eight boards, each with an accelerator of its own, in the project's targets."""
    folder = tmp_path_factory.mktemp("boards")
    jetsons = []
    for number in range(1, COUNT + 1):
        jetson = FakeJetson(folder / str(number), "simulated-orin-nano-jp62", folder)
        jetson.set(TENSORRT_DOUBLE_KERNEL_MS=KERNEL_MS)
        jetsons.append(jetson)
        values = jetson.target_values() | {"name": f"simulated-{number}", "labels": {"class": "simulated"}}
        (jetson_project / f"targets/simulated-{number}.yaml").write_text(yaml.safe_dump(values))
    yield jetsons
    for jetson in jetsons:
        jetson.close()


def test_eight_targets_take_hardly_longer_than_one(boards, jetson_project, jetway_here, record_property):
    path = jetson_project / "my_recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    recipe["benchmark"] = {"warmup_runs": 2, "min_queries": 50, "min_duration_s": 6, "max_extensions": 0}
    path.write_text(yaml.safe_dump(recipe | {"evaluate": {"samples": 80}}))

    def seconds(selector, *changes):
        began = time.monotonic()
        words = ["--target", selector, *changes, "--json"]
        run = jetway_here("run", "my_recipe.yaml", *words, cwd=jetson_project)
        assert run.json["status"] == "FINISHED", run.stderr
        assert all(row["simulated"] for row in run.json["variants"])
        assert len(run.json["targets"]) == (1 if selector == "simulated-1" else COUNT)
        return time.monotonic() - began

    seconds("class=simulated", "--set", "benchmark.min_duration_s=0.5", "--set", "evaluate.samples=10")
    one_s, all_s = seconds("simulated-1"), seconds("class=simulated")
    record_property("ratio", all_s / one_s)
    print(f"{COUNT} simulated targets took {all_s:.1f} s, one {one_s:.1f} s: x{all_s / one_s:.2f}")
    assert all_s <= LONGEST_RATIO * one_s
