import shlex
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jetway.configs import recipes as packaged_recipes
from jetway.configs import targets as packaged_targets
from jetway.configs.load import (
    apply_override,
    load_recipe,
    load_target,
    load_targets,
    parse_yaml,
    read_yaml,
    validate,
)
from jetway.configs.schema import Recipe, Target, Variant
from jetway.tasks.errors import ConfigError

MINIMAL = {
    "name": "mine",
    "workload": {"class_path": "my_package.my_module:Mine"},
    "variants": ["baseline-fp32"],
}


def write(tmp_path, **changes):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, **changes}))
    return str(path)


def test_minimal_recipe_takes_defaults(tmp_path):
    recipe, path = load_recipe(write(tmp_path))
    assert recipe.prune.round_to == 8
    assert path == tmp_path / "recipe.yaml"


def test_override_reaches_a_nested_key(tmp_path):
    recipe, _ = load_recipe(write(tmp_path), ["qat.epochs=7", "prune.ignored_layers=[head, 'stem.*']"])
    assert recipe.qat.epochs == 7
    assert recipe.prune.ignored_layers == ("head", "stem.*")


@pytest.mark.parametrize(
    ("changes", "overrides", "fragments"),
    [
        ({"qatt": {}}, [], ["recipe.yaml", "qatt", "Did you mean 'qat'?"]),
        ({"qat": {"epoch": 3}}, [], ["qat.epoch: unknown key", "Did you mean 'epochs'?", "learning_rate"]),
        ({"qat": {"epochs": "many"}}, [], ["qat.epochs", "'many'", "QAT epochs"]),
        ({"prune": {"pruning_ratio": 1.0}}, [], ["prune.pruning_ratio", "1.0", "less than 1"]),
        ({"prune": {"importance": "l3"}}, [], ["prune.importance", "'l3'", "'l1'", "'taylor'"]),
        (
            {"variants": ["baseline-fp32", "pruned-int4"]},
            [],
            ["variants.1", "pruned-int4", "pruned-int8-qat"],
        ),
        ({"variants": ["pruned-fp32"]}, [], ["variants", "baseline-fp32"]),
        ({"gates": ["top1 > 0.9"]}, [], ["gates.0", "top1 > 0.9", "<= 0.01"]),
        ({"workload": {}}, [], ["workload.class_path: missing", "my_package.my_module:MyWorkload"]),
        ({"name": "x; rm -rf /"}, [], ["name", "rm -rf"]),
        ({}, ["qat.epochz=3"], ["qat.epochz", "Did you mean 'epochs'?"]),
        ({}, ["qat.epochs"], ["key=value"]),
        ({}, ["name.first=3"], ["'mine'", "no keys below"]),
        ({}, ["qat.epochs=[3"], ["--set", "not valid YAML"]),
        (
            {"variants": ["baseline-fp32", "pruned-int8-ptq"], "export": {"opset": 11}},
            [],
            ["export.opset is 11", "13 or more"],
        ),
        ({}, ["export.opset=21"], ["export.opset", "21", "less than or equal to 20"]),
        (
            {},
            ["prune.pruning_ratio=1.0"],
            ["prune.pruning_ratio: 1.0 is not allowed", "less than 1", "'auto'"],
        ),
        ({}, ["prune.pruning_ratio=auto"], ["prune", "target_macs_ratio asks for: set that too"]),
        ({}, ["qat=3"], ["qat: 3 is not allowed", "calibration_samples", "learning_rate"]),
        ({}, ["train=fast"], ["train: 'fast' is not allowed", "batch_size, ema_decay, epochs"]),
        ({}, ["benchmark.revision=2"], ["benchmark.revision: unknown key", "min_queries"]),
        ({}, ["evaluate.revision=2"], ["evaluate.revision: unknown key", "samples"]),
        ({"variants": ["baseline-fp32", "pruned-fp16-on-gpu"]}, [], ["pruned-fp16-on-gpu", "-on-ort-cuda"]),
        (
            {},
            ["tensorrt.workspace_mib=[256, 1024]"],
            ["tensorrt.workspace_mib", "smaller than the one before"],
        ),
        ({}, ["tensorrt.optimization_level=6"], ["tensorrt.optimization_level", "less than or equal to 5"]),
        ({}, ["tensorrt.mixed={head: fp8}"], ["tensorrt.mixed.head", "'fp8'", "'fp16'"]),
        (
            {},
            ["tensorrt.profiles=[{image: {min: [1, 3], opt: [4, 3], max: [2, 3]}}]"],
            ["tensorrt.profiles", "min <= opt <= max"],
        ),
        (
            {},
            ["tensorrt.profiles=[{image: {min: [1], opt: [4, 3], max: [4, 3]}}]"],
            ["as many dimensions"],
        ),
        ({}, ["benchmark.scenarios=[throughput]"], ["benchmark.scenarios", "latency must be among them"]),
        ({}, ["benchmark.power_mode=$(reboot)"], ["benchmark.power_mode", "MAXN"]),
        ({"gates": ["power_w_mean <= 15"]}, [], ["power_w_mean <= 15", "benchmark.power: {}"]),
        ({"gates": ["in_flight_samples_per_s >= 30"]}, [], ["benchmark.scenarios: [latency, throughput]"]),
        ({}, ["benchmark.keep_loaded=sometimes"], ["benchmark.keep_loaded", "'sometimes'"]),
        ({}, ["tensorrt.dla=true"], ["tensorrt.dla", "core", "gpu_fallback"]),
    ],
)
def test_bad_recipe_says_file_key_value_and_fix(tmp_path, changes, overrides, fragments):
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(tmp_path, **changes), overrides)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize(
    ("text", "stage", "precision", "on"),
    [
        ("baseline-fp32", "baseline", "fp32", None),
        ("pruned-bf16", "pruned", "bf16", None),
        ("pruned-int8-calibrated", "pruned", "int8-calibrated", None),
        ("pruned-int8-qat-on-ort-tensorrt", "pruned", "int8-qat", "ort-tensorrt"),
    ],
)
def test_a_variant_is_read_from_its_name_and_written_so(text, stage, precision, on):
    variant = Variant.model_validate(text)
    assert (variant.stage, variant.precision, variant.on, variant.name) == (stage, precision, on, text)


def test_engines_of_a_variant_are_the_targets_unless_it_names_one():
    target = Target(name="orin", engine="tensorrt")
    named = [Variant.model_validate(f"baseline-fp32{on}") for on in ("", "-on-ort-cuda", "-on-ort-cpu")]
    assert [target.backend(variant).name for variant in named] == [
        "tensorrt",
        "onnxruntime-cuda",
        "onnxruntime",
    ]


@pytest.mark.parametrize(
    ("keys", "name", "leased"),
    [
        ({}, "onnxruntime", "onnxruntime"),
        ({"engine": "tensorrt"}, "tensorrt", "tensorrt"),
        ({"providers": ["CUDAExecutionProvider", "CPUExecutionProvider"]}, "onnxruntime-cuda", "tensorrt"),
    ],
)
def test_the_lease_is_of_the_gpu_where_one_is_used(keys, name, leased):
    target = Target(name="box", **keys)
    assert (target.own_backend.name, target.leased_engine) == (name, leased)


def test_unknown_recipe_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"Did you mean 'digits'\?"):
        load_recipe("digit")


def test_unknown_target_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match="loopback"):
        load_target("lopback")


def write_target(folder, stem, **keys):
    folder.mkdir(exist_ok=True)
    path = folder / f"{stem}.yaml"
    path.write_text(yaml.safe_dump({"kind": "loopback", **keys}))
    return path


def test_targets_come_in_the_order_of_their_names(tmp_path):
    path = write_target(tmp_path / "targets", "board", name="board")
    near = tmp_path / "recipe.yaml"
    assert [target.name for target in load_targets(["board", "loopback"], near=near)] == ["board", "loopback"]
    assert load_targets([str(path)])[0].name == "board"


def test_a_target_given_twice_is_refused():
    with pytest.raises(ConfigError, match="'loopback' and 'loopback' are both the target 'loopback'"):
        load_targets(["loopback", "loopback"])


def test_two_files_of_one_target_name_are_refused(tmp_path):
    paths = [str(write_target(tmp_path, stem, name="board")) for stem in ("one", "two")]
    with pytest.raises(ConfigError) as caught:
        load_targets(paths)
    for path in paths:
        assert path in str(caught.value)


def test_a_file_found_by_name_must_have_that_name(tmp_path):
    write_target(tmp_path / "targets", "board", name="other")
    with pytest.raises(ConfigError, match=r"board\.yaml: its name is 'other'.*'board'"):
        load_target("board", near=tmp_path / "recipe.yaml")


def test_the_example_target_is_valid_and_no_known_name():
    example = Path(packaged_targets.__file__).parent / "jetson.yaml.example"
    assert validate(Target, read_yaml(example), source=str(example)).engine == "tensorrt"
    with pytest.raises(ConfigError, match="Known names: loopback"):
        load_target("jetson")


@pytest.mark.parametrize("text", ["a: 1\na: 2\n", "a: &x 1\nb: *x\n", "a: [", "\t", "? {}\n: 1\n", "a: 0o9"])
def test_doubtful_yaml_is_refused_or_read(text):
    try:
        parse_yaml(text, "recipe.yaml")
    except ConfigError as exc:
        assert "recipe.yaml" in str(exc)


def test_doubled_key_is_refused():
    with pytest.raises(ConfigError, match="'a' stands there twice"):
        parse_yaml("a: 1\na: 2\n", "recipe.yaml")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3)
    ),
    max_leaves=8,
)
KEYS = st.sampled_from([*Recipe.model_fields, "nonsense"])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(KEYS, JSON, max_size=4))
def test_any_values_give_a_recipe_or_a_config_error(changes):
    try:
        validate(Recipe, {**MINIMAL, **changes}, source="fuzzed.yaml")
    except ConfigError as exc:
        assert "fuzzed.yaml" in str(exc)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_any_text_gives_a_value_or_a_config_error(text):
    try:
        parse_yaml(text, "fuzzed.yaml")
    except ConfigError as exc:
        assert "fuzzed.yaml" in str(exc)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_any_override_gives_values_or_a_config_error(override):
    try:
        apply_override(dict(MINIMAL), override)
    except ConfigError as exc:
        assert "--set" in str(exc)


@pytest.mark.parametrize(
    "path", sorted(Path(packaged_recipes.__file__).parent.glob("*.yaml")), ids=lambda p: p.stem
)
def test_packaged_recipes_are_valid(path):
    recipe, _ = load_recipe(path.stem)
    assert recipe.name == path.stem


def test_what_the_tensorrt_recipe_says_of_a_nano_can_be_typed():
    """Its comment gives the options; with them no gate is left without a variant."""
    path = Path(packaged_recipes.__file__).with_name("digits-tensorrt.yaml")
    (line,) = [line for line in path.read_text().splitlines() if line.startswith("# A Jetson Nano")]
    options = shlex.split(line.partition("wants: ")[2])
    recipe, _ = load_recipe("digits-tensorrt", [word for word in options if word != "--set"])
    assert recipe.export.opset == 13
    assert not any(variant.precision.is_int8 for variant in recipe.variants)


def test_variants_may_name_a_calibration_and_an_engine(tmp_path):
    names = [
        "baseline-fp32",
        "baseline-int8-ptq",
        "baseline-int8-ptq-mse",
        "pruned-int8-ptq-entropy-on-ort-cpu",
    ]
    recipe = load_recipe(write(tmp_path, variants=[*names, "baseline-int8-dynamic"]), [])[0]
    assert [variant.name for variant in recipe.variants] == [*names, "baseline-int8-dynamic"]
    assert recipe.variants[3].calibration == "entropy"
    assert recipe.variants[3].on == "ort-cpu"
    for wrong in ("baseline-int8-qat-mse", "baseline-int8-ptq-best", "baseline-fp32-max"):
        with pytest.raises(ConfigError, match=r"unknown variant .*behind int8-ptq -max, -entropy"):
            load_recipe(write(tmp_path, variants=["baseline-fp32", wrong]), [])


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A project with three boards."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "targets").mkdir()
    boards = {
        "b": {"class": "orin", "site": "lab"},
        "a": {"class": "orin", "site": "car"},
        "c": {"site": "lab"},
    }
    for name, labels in boards.items():
        (tmp_path / f"targets/{name}.yaml").write_text(yaml.safe_dump({"name": name, "labels": labels}))
    return tmp_path


@pytest.mark.parametrize(
    ("choices", "names"),
    [
        (["class=orin"], ["a", "b"]),
        (["site=lab,class=orin"], ["b"]),
        (["all"], ["a", "b", "c"]),
        (["c", "class=orin"], ["a", "b", "c"]),
        (["class=orin", "b"], ["a", "b"]),
        (["site=car", "site=lab"], ["a", "b", "c"]),
        (["all", "loopback"], ["a", "b", "c", "loopback"]),
    ],
)
def test_labels_select_targets(choices, names, lab):
    assert sorted(target.name for target in load_targets(choices)) == names
    recipe, path = load_recipe(write(lab, targets=choices))
    assert sorted(target.name for target in load_targets(recipe.targets, near=path)) == names


@pytest.mark.parametrize(
    ("choice", "fragments"),
    [
        ("class=xavier", ["class=xavier", "class=orin (a, b)", "site=lab (b, c)"]),
        ("class=orin,site=moon", ["no target of this project fits"]),
        ("class=", ["'class='", "class=orin"]),
        ("class=orin,", ["''"]),
    ],
)
def test_a_selector_that_fits_nothing_says_what_there_is(choice, fragments, lab):
    with pytest.raises(ConfigError) as caught:
        load_targets([choice])
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_a_board_without_a_class_is_alone_in_its_own(lab):
    assert [target.target_class for target in load_targets(["all"])] == ["orin", "orin", "c"]
