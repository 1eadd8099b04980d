"""Bad input, each kind: its exit code, a message that names the fix, no traceback, and nothing partial left."""

import pytest
import torch
import yaml

from jetway.tasks.tracking.tracker import Tracker

# What libraries warn of is no concern of the user who mistyped a key.
pytestmark = [pytest.mark.serial, pytest.mark.filterwarnings("default")]


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
    (project / "targets").mkdir()
    (project / "targets/board.yaml").write_text(yaml.safe_dump({"name": "board", **keys}))
    edit(project, targets=["board"])


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
    run = jetway_here("run", "my_recipe.yaml", cwd=project)
    assert run.exit_code == exit_code, run.stderr
    for fragment in fragments:
        assert fragment in run.stderr
    assert "Traceback" not in run.stderr
    assert run.stdout == ""
    assert leftovers(cli_home) == []


def leftovers(home):
    """Temporary files in the store, and runs that nobody ended."""
    files = [path for path in (home / "store/tmp").glob("*")] if (home / "store/tmp").exists() else []
    tracker = Tracker(f"sqlite:///{home / 'mlflow.db'}")
    return files + [run.run_id for run in tracker.pipeline_runs() if run.status == "RUNNING"]


HOSTILE = [
    "; touch pwned",
    "$(touch pwned)",
    "`touch pwned`",
    "' touch pwned '",
    "&& touch pwned",
    "a\ntouch pwned",
]


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_strings_reach_no_shell(value, project, jetway_here):
    """In every string field: refused as config, or carried as data; never run."""
    target_file(project, kind="loopback", python=value, work_dir=str(project / f"work {value}"))
    assert jetway_here("check", "my_recipe.yaml", cwd=project).exit_code in {2, 3}
    for field in ("name", "description"):
        edit(project, **{field: value})
    edit(project, workload={"checkpoint": value, "options": {"width": value}})
    assert jetway_here("check", "my_recipe.yaml", cwd=project).exit_code == 2
    assert not list(project.rglob("pwned"))
