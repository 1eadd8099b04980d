"""Bad input, each kind: its exit code, a message that names the fix, no traceback, and nothing partial left."""

import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from jetway.tasks.tracking.tracker import Tracker

# What libraries warn of is no concern of the user who mistyped a key.
pytestmark = pytest.mark.filterwarnings("default")


def edit(project, **changes):
    path = project / "my_recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    for key, value in changes.items():
        section = recipe.setdefault(key, {})
        recipe[key] = {**section, **value} if isinstance(value, dict) and isinstance(section, dict) else value
    path.write_text(yaml.safe_dump(recipe))


def replace(project, old, new):
    path = project / "my_package/my_module.py"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def pickled(project):
    torch.save(torch.nn.Linear(2, 2), project / "weights.pt")
    edit(project, workload={"checkpoint": "weights.pt"})


def corrupt(project):
    (project / "weights.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{ not json")
    edit(project, workload={"checkpoint": "weights.safetensors"})


def target_file(project, **keys):
    (project / "targets").mkdir(exist_ok=True)
    (project / "targets/board.yaml").write_text(yaml.safe_dump({"name": "board", **keys}))
    edit(project, targets=["board"])


def append(project, text):
    path = project / "my_package/my_module.py"
    path.write_text(f"{path.read_text()}\n{text}\n")


# case: (what is done to a good project, exit code, what the message says)
CASES = {
    "unknown key": (lambda p: edit(p, qat={"epoch": 2}), 2, ["qat.epoch", "Did you mean 'epochs'?"]),
    "wrong type": (lambda p: edit(p, qat={"epochs": "two"}), 2, ["qat.epochs", "'two'"]),
    "pruning ratio 1.0": (lambda p: edit(p, prune={"pruning_ratio": 1.0}), 2, ["prune.pruning_ratio", "less than 1"]),
    "missing workload": (
        lambda p: edit(p, workload={"class_path": "my_package.gone:MyWorkload"}), 2, ["my_package.gone", "folder"],
    ),
    "workload of another name": (
        lambda p: edit(p, workload={"class_path": "my_package.my_module:Other"}), 2, ["no class 'Other'"],
    ),
    "unknown workload option": (lambda p: edit(p, workload={"options": {"widht": 3}}), 2, ["widht", "width"]),
    "unknown gate metric": (lambda p: edit(p, gates=["top2 >= 0.5"]), 2, ["top2", "top1"]),
    "gate on no variant": (lambda p: edit(p, gates=["prund-*: top1 >= 0.5"]), 2, ["prund-*", "pruned-fp32"]),
    "missing checkpoint": (lambda p: edit(p, workload={"checkpoint": "gone.safetensors"}), 2, ["gone.safetensors"]),
    "no checkpoint and no training": (lambda p: edit(p, train=None), 2, ["workload.checkpoint", "train"]),
    "syntax error in the workload": (lambda p: append(p, "def broken(:"), 2, ["SyntaxError", "my_module.py, line"]),
    "workload that fails at import": (lambda p: append(p, "1 / 0"), 2, ["ZeroDivisionError", "my_module.py, line"]),
    "constructor that fails": (
        lambda p: append(p, "MyWorkload.__init__ = lambda self, width: [][width]"),
        2, ["IndexError", "my_module.py, line"],
    ),
    "example inputs without names": (
        lambda p: append(p, "MyWorkload.example_inputs = lambda self: torch.zeros(1, 3)"),
        4, ["example_inputs() returned a Tensor", "dict"],
    ),
    "unknown target": (lambda p: edit(p, targets=["bord"]), 2, ["bord", "Known names"]),
    "kept layer that does not exist": (
        lambda p: edit(p, qat={"keep_float": ["sixth"]}), 2, ["qat.keep_float", "sixth"],
    ),
    "forward fails": (
        lambda p: replace(p, "nn.Flatten(), ", ""), 4, ["example_inputs", "MyWorkload"],
    ),
    "pickled checkpoint": (pickled, 4, ["weights.pt", "never unpickles", "safetensors"]),
    "corrupt checkpoint": (corrupt, 4, ["weights.safetensors", "Copy it again"]),
    "loss is not a number": (
        lambda p: replace(p, "return functional.cross_entropy(outputs[\"logits\"], target)",
                          "return functional.cross_entropy(outputs[\"logits\"], target) * float('nan')"),
        4, ["epoch 1", "learning_rate"],
    ),
    "ignored layer that does not exist": (
        lambda p: edit(p, prune={"ignored_layers": ["sixth"]}), 2, ["prune.ignored_layers", "sixth"],
    ),
    "unreachable host": (
        lambda p: target_file(p, host="127.0.0.1", port=9), 3, ["127.0.0.1:9", "host and port"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_explained(case, project, jetway_here, cli_home):
    spoil, exit_code, fragments = CASES[case]
    edit(project, train={"epochs": 1}, finetune={"epochs": 1})
    spoil(project)
    assert_explained(jetway_here("run", "my_recipe.yaml", cwd=project), exit_code, fragments, cli_home)


def assert_explained(run, exit_code, fragments, home):
    assert run.exit_code == exit_code, run.stderr
    for fragment in fragments:
        assert fragment in run.stderr
    assert "Traceback" not in run.stderr
    assert run.stdout == ""
    assert leftovers(home) == []


def leftovers(home):
    """Temporary files in the store, and runs that nobody ended."""
    files = [path for path in (home / "store/tmp").glob("*")] if (home / "store/tmp").exists() else []
    tracker = Tracker(f"sqlite:///{home / 'mlflow.db'}")
    return files + [run.run_id for run in tracker.pipeline_runs() if run.status == "RUNNING"]


FIELDS_OF_A_TARGET = ("python", "work_dir", "host", "user", "identity_file", "known_hosts")
FIELDS_OF_A_RECIPE = {
    "name": lambda text: {"name": text},
    "class_path": lambda text: {"workload": {"class_path": f"my_package.my_module:{text}"}},
    "checkpoint": lambda text: {"workload": {"checkpoint": text}},
    "options": lambda text: {"workload": {"options": {"width": text}}},
    "ignored_layers": lambda text: {"prune": {"ignored_layers": [text]}},
    "keep_float": lambda text: {"qat": {"keep_float": [text]}},
    "gates": lambda text: {"gates": [text]},
}


def payloads(tmp_path):
    """Each would leave a file if a shell read it, whatever quotes stand around it."""
    command = f"touch {tmp_path}/pwned"
    return [
        f"; {command}",
        f"$({command})",
        f"`{command}`",
        f"' ; {command} '",
        f'" && {command} "',
        f"a\n{command}",
    ]


@pytest.mark.parametrize("field", FIELDS_OF_A_TARGET)
def test_hostile_target_fields_reach_no_shell(field, project, tmp_path, jetway_here, cli_home):
    """Refused as config, or carried as data; never run."""
    here = field in {"python", "work_dir"}
    (project / "targets").mkdir()
    edit(project, targets=["board"])
    for text in payloads(tmp_path):
        place = {"kind": "loopback"} if here else {"host": "127.0.0.1", "port": 9}
        values = {"name": "board", **place, field: f"{tmp_path}/work{text}" if field == "work_dir" else text}
        (project / "targets/board.yaml").write_text(yaml.safe_dump(values))
        check = jetway_here("check", "my_recipe.yaml", cwd=project)
        # A work folder may have any name.
        assert check.exit_code in ({0, 2, 3} if field == "work_dir" else {2, 3}), check.stderr
        assert not pwned(tmp_path, cli_home)


@pytest.mark.parametrize("field", FIELDS_OF_A_RECIPE)
def test_hostile_recipe_fields_reach_no_shell(field, project, tmp_path, jetway_here, cli_home):
    for text in payloads(tmp_path):
        edit(project, **FIELDS_OF_A_RECIPE[field](text))
        check = jetway_here("check", "my_recipe.yaml", cwd=project)
        assert check.exit_code == (4 if field == "options" else 2), check.stderr
        assert not pwned(tmp_path, cli_home)


def pwned(*folders):
    """Files that a payload made. A folder of that name is only the end of a hostile work_dir."""
    return [path for folder in folders for path in folder.rglob("pwned") if path.is_file()]


def test_target_whose_python_lacks_the_engine(project, jetway_here):
    python = Path(sys.base_prefix) / "bin/python3"
    if subprocess.run([python, "-c", "import onnxruntime"], capture_output=True, check=False).returncode == 0:
        pytest.skip("needs a Python without onnxruntime: the one that the environment was made of has it")
    target_file(project, kind="loopback", python=str(python))
    check = jetway_here("check", "my_recipe.yaml", cwd=project)
    assert check.exit_code == 3
    assert "onnxruntime" in check.stderr


@pytest.fixture
def ssh_project(project, sshd):
    """The README's project with an OpenSSH server as its target ``board``, whose keys may be changed."""

    def make(**changes):
        keys = sshd.target().model_dump(include={"host", "port", "user", "identity_file", "known_hosts"})
        target_file(project, **(keys | changes))
        return project

    return make


@pytest.fixture
def another_key(tmp_path):
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "another"], check=True)
    return tmp_path / "another"


def test_wrong_key_is_explained(ssh_project, another_key, jetway_here, cli_home):
    project = ssh_project(identity_file=str(another_key))
    run = jetway_here("run", "my_recipe.yaml", cwd=project)
    assert_explained(run, 3, ["board", str(another_key), "authorized_keys"], cli_home)


def test_changed_host_key_is_explained(sshd, ssh_project, another_key, tmp_path, jetway_here, cli_home):
    key = another_key.with_suffix(".pub").read_text()
    (tmp_path / "known_hosts").write_text(f"[127.0.0.1]:{sshd.port} {key}")
    project = ssh_project(known_hosts=str(tmp_path / "known_hosts"))
    run = jetway_here("run", "my_recipe.yaml", cwd=project)
    assert_explained(run, 3, ["board", "has changed", "jetway trust board", "SHA256:"], cli_home)


def test_disk_full_on_the_target_is_explained(project, mount_disk, jetway_here, cli_home):
    """Refused before any training, or where the check is off when a file does not fit, and then nothing of it stays."""
    disk = mount_disk("2m")
    edit(project, variants=["baseline-fp32"], gates=[], train={"epochs": 1})
    target_file(project, kind="loopback", work_dir=f"{disk}/jetway")
    run = jetway_here("run", "my_recipe.yaml", cwd=project)
    assert_explained(run, 3, ["board", "MiB of disk are free", "min_free_disk_mib", "work_dir"], cli_home)

    target_file(project, kind="loopback", work_dir=f"{disk}/jetway", min_free_disk_mib=0)
    there = sorted((disk / "jetway").rglob("*"))
    free = shutil.disk_usage(disk).free
    (disk / "filler").write_bytes(bytes(free - 100_000))
    run = jetway_here("run", "my_recipe.yaml", cwd=project)
    assert_explained(run, 3, ["board", "bytes", "are free", "set work_dir"], cli_home)
    assert sorted((disk / "jetway").rglob("*")) == there


def test_trust_without_a_terminal_records_nothing(sshd, project, jetway_here, cli_home, monkeypatch):
    target_file(project, host="127.0.0.1", port=sshd.port, user="nobody")
    monkeypatch.setattr("sys.stdin", io.StringIO())
    trust = jetway_here("trust", "board", cwd=project)
    assert trust.exit_code == 3
    assert "use --yes after comparing" in trust.stdout
    assert not (cli_home / "known_hosts").exists()


@pytest.mark.parametrize(
    "changes", [{"targets": ["bord"]}, {"workload": {"class_path": "my_package.gone:MyWorkload"}}]
)
def test_what_a_look_can_tell_starts_no_server(changes, project, jetway_here, tmp_path, monkeypatch):
    edit(project, **changes)
    monkeypatch.setenv("JETWAY_HOME", str(tmp_path / "fresh"))
    assert jetway_here("run", "my_recipe.yaml", cwd=project).exit_code == 2
    assert not (tmp_path / "fresh").exists()


@pytest.mark.parametrize(
    ("words", "exit_code", "fragment"),
    [
        (["run", "gone"], 2, "gone"),
        (["run", "my_recipe.yaml", "--target", "bord"], 2, "bord"),
        (["run", "my_recipe.yaml", "--set", "finetune.epoch=1"], 2, "finetune.epoch"),
        (["probe", "board"], 3, "127.0.0.1:9"),
        (["probe", "bord"], 2, "bord"),
        (["doctor", "bord"], 2, "bord"),
        (["show", "0123456789ab"], 6, "0123456789ab"),
    ],
)
def test_json_of_what_fails_at_once_is_one_object(words, exit_code, fragment, project, jetway_here):
    target_file(project, host="127.0.0.1", port=9)
    failed = jetway_here(*words, "--json", cwd=project)
    told = failed.json
    assert (failed.exit_code, told["status"], told["exit_code"]) == (exit_code, "FAILED", exit_code)
    assert fragment in told["error"]
    assert failed.stderr.strip().endswith(told["error"].strip())


def test_json_of_a_run_that_fails_names_the_error_and_the_run(project, jetway_here):
    target_file(project, host="127.0.0.1", port=9)
    failed = jetway_here("run", "my_recipe.yaml", "--json", cwd=project)
    told = failed.json
    assert (failed.exit_code, told["status"], told["exit_code"]) == (3, "FAILED", 3)
    assert "127.0.0.1:9" in told["error"]
    assert told["run_id"]
    assert failed.stderr.count(told["error"]) >= 1
