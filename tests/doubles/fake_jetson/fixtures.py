"""Fake Jetsons that are switched on when a test asks for them, and a project that deploys to them."""

import threading

import pytest
import yaml

from doubles.fake_jetson.target import FakeJetson

RECIPE = {
    "name": "simulated",
    "train": {"epochs": 1, "learning_rate": 3e-3},
    "prune": {"pruning_ratio": 0.5, "round_to": 8},
    "finetune": {"epochs": 0},
    "qat": {"calibration_samples": 16},
    # As the oldest of them takes it.
    "export": {"opset": 13},
    "tensorrt": {"workspace_mib": [512, 256, 128]},
    "variants": ["baseline-fp32", "baseline-fp16", "pruned-int8-ptq"],
    "gates": [],
}
QUICK = {
    "verify": {"samples": 16},
    "benchmark": {"warmup_runs": 2, "min_queries": 30, "min_duration_s": 0.1, "max_extensions": 1},
}


@pytest.fixture(scope="session")
def switch_on(tmp_path_factory):
    """``switch_on("simulated-nano-jp46")``: that fake, running as if it had just been installed; one of each."""
    folder = tmp_path_factory.mktemp("fake jetsons")
    jetsons = {}

    def start(name):
        if name not in jetsons:
            jetsons[name] = FakeJetson(folder / name, name, folder)
            jetsons[name].start()
        return jetsons[name]

    yield start
    for jetson in jetsons.values():
        jetson.close()


@pytest.fixture
def fault(switch_on):
    """``fault("simulated-nano-jp46", "slow_build:2")``: what TensorRT's double does there until the test ends."""
    faulty = []

    def inject(name, text):
        faulty.append(switch_on(name))
        faulty[-1].set(TENSORRT_DOUBLE_FAULT=text)

    yield inject
    for jetson in faulty:
        jetson.set()


@pytest.fixture
def jetson_project(project):
    """The README's workload with a recipe that is quick, and an empty folder for targets."""
    recipe = yaml.safe_load((project / "my_recipe.yaml").read_text())
    recipe["workload"]["options"] = {"width": 16}
    (project / "my_recipe.yaml").write_text(yaml.safe_dump(recipe | RECIPE | QUICK))
    (project / "targets").mkdir()
    return project


@pytest.fixture
def on_jetsons(jetson_project, jetway_here, switch_on):
    """``on_jetsons("run", NAME, ..., variants=[...])``: a command on these fakes, with changed keys of the recipe."""

    def run(command, *names, target_changes=None, **changes):
        recipe = yaml.safe_load((jetson_project / "my_recipe.yaml").read_text())
        (jetson_project / "changed.yaml").write_text(yaml.safe_dump(recipe | changes))
        targets = [word for name in names for word in ("--target", name)]
        for name in names:
            switch_on(name).write_target(jetson_project / "targets", **(target_changes or {}).get(name, {}))
        options = ["--json"] if command == "run" else []
        return jetway_here(command, "changed.yaml", *options, *targets, cwd=jetson_project)

    return run


@pytest.fixture
def when():
    """``when(condition, action)``: acts once, as soon as the condition holds, beside the test and no longer than it."""
    watchers = []

    def watch(condition, action):
        watchers.append(Watcher(condition, action))
        watchers[-1].start()

    yield watch
    for watcher in watchers:
        watcher.is_over.set()
        watcher.join()
        assert watcher.has_acted, "what should have set it off never came"


class Watcher(threading.Thread):
    def __init__(self, condition, action):
        super().__init__(daemon=True)
        self.condition, self.action = condition, action
        self.has_acted, self.is_over = False, threading.Event()

    def run(self):
        while not self.is_over.wait(0.02):
            if self.condition():
                self.action()
                self.has_acted = True
                return
