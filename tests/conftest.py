"""What tests share: a home of their own, a real Prefect server in it, and a user's project from the README."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

from jetway.flows.server import stop_server

ROOT = Path(__file__).parents[1]

sys.path.append(str(ROOT / "tests"))
pytest_plugins = ["doubles.fixtures"]

#: Files whose runs would only wait for each other: one at a time has this machine's accelerator.
ON_TARGETS = {
    f"integration/test_{name}.py"
    for name in (
        "bad_input",
        "deploy",
        "deployed",
        "fleet",
        "interrupted",
        "package",
        "plan_b",
        "streams",
        "target_connection",
        "target_jobs",
        "target_loopback",
        "target_transfer",
        "whole_recipes",
    )
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return Groups(config, log)


class Groups(LoadScopeScheduling):
    """Tests of one file run in one process, for the sake of its fixtures.

    pytest-xdist's own marks of groups are lost with pytest 9.2 (its issue 1386).
    """

    def _split_scope(self, nodeid):
        file = nodeid.partition("::")[0]
        return "targets" if file.removeprefix("tests/") in ON_TARGETS else file


@pytest.fixture(autouse=True)
def _own_home(tmp_path, monkeypatch, request):
    """No test may touch the developer's own state."""
    monkeypatch.setenv("JETWAY_HOME", str(tmp_path / "jetway-home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)


@pytest.fixture
def mount_disk(tmp_path):
    """Mounts a small disk, of "300k" say, and returns its folder."""
    mounted = []

    def mount(size):
        folder = tmp_path / f"disk of {size}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("may not mount a small disk here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="session")
def cli_home(tmp_path_factory):
    """One home for the tests that run the command, so that its Prefect server starts once. It has a space."""
    home = tmp_path_factory.mktemp("jetway") / "a home"
    yield home
    stop_server(home=home)


COMMAND = [sys.executable, "-m", "jetway.flows"]


def environment(home):
    return os.environ | {"JETWAY_HOME": str(home), "COLUMNS": "120", "PYTHONWARNINGS": "default"}


class Run:
    """A finished ``jetway`` command."""

    def __init__(self, completed):
        self.exit_code = completed.returncode
        self.stdout = completed.stdout
        self.stderr = completed.stderr

    @property
    def json(self):
        return json.loads(self.stdout)

    def stages(self, *, cached):
        return [stage["name"] for stage in self.json["stages"] if stage["cached"] is cached]

    def metrics(self, variant):
        return next(row for row in self.json["variants"] if row["variant"] == variant)["metrics"]


@pytest.fixture
def start_jetway(cli_home):
    """Starts the command as a user would and returns its Popen; what is left of it is killed at the end."""
    started = []

    def start(*arguments, cwd, home=cli_home, **variables):
        process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            cwd=cwd,
            env=environment(home) | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def jetway(start_jetway):
    """Runs the command to its end."""

    def run(*arguments, cwd, timeout_s=300, **variables):
        process = start_jetway(*arguments, cwd=cwd, **variables)
        stdout, stderr = process.communicate(timeout=timeout_s)
        return Run(subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr))

    return run


@pytest.fixture
def jetway_here(cli_home, monkeypatch, capsys):
    """Runs the command in this process, which saves seconds of imports; for runs that end early."""
    from jetway.flows.__main__ import main

    monkeypatch.setenv("JETWAY_HOME", str(cli_home))
    modules, path = set(sys.modules), list(sys.path)

    def run(*arguments, cwd):
        monkeypatch.chdir(cwd)
        exit_code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        for name in {name for name in sys.modules if name.startswith("my_package")} - modules:
            del sys.modules[name]
        return Run(subprocess.CompletedProcess(arguments, exit_code, captured.out, captured.err))

    yield run
    sys.path[:] = path


def readme_block(title):
    """The fenced block of the README below the comment of that title, to the letter."""
    text = (ROOT / "README.md").read_text()
    return re.search(rf"<!-- {title} -->\n```\w+\n(.*?)```", text, re.DOTALL)[1]


@pytest.fixture
def project(tmp_path):
    """A user's project: the workload and the recipe of the README."""
    folder = tmp_path / "my project"
    (folder / "my_package").mkdir(parents=True)
    (folder / "my_package/__init__.py").touch()
    (folder / "my_package/my_module.py").write_text(readme_block("workload example"))
    (folder / "my_recipe.yaml").write_text(readme_block("recipe example"))
    return folder
