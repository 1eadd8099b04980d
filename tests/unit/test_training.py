import pytest
import torch
from torch import nn

from jetway.configs.schema import (
    DistillationConfig,
    FinetuneConfig,
    OptimizerName,
    QatConfig,
    ScheduleName,
    SlimmingConfig,
    TrainConfig,
)
from jetway.tasks.errors import ConfigError, TrainingError, WorkloadError
from jetway.tasks.features import Features, feature_loss, feature_names
from jetway.tasks.metrics import Metric
from jetway.tasks.stage import StageContext
from jetway.tasks.store import Store
from jetway.tasks.training import batchnorm_scales, distillation_loss, evaluate, learning_rate_at, train
from jetway.tasks.weight_average import WeightAverage


@pytest.fixture
def workload(small_workload):
    return small_workload()


@pytest.fixture
def run(workload, tmp_path):
    """Trains a network made from one seed, in a work folder of its own unless told otherwise."""
    folders = iter(range(100))

    def train_once(section, *, folder=None, seed=0, teacher=None, on_epoch=None, progress=None):
        context = StageContext(
            workload, Store(tmp_path), seed=seed, work_dir=tmp_path / str(folder or next(folders))
        )
        context.progress = progress or context.progress
        torch.manual_seed(7)
        network = workload.network()
        result = train(
            network,
            workload,
            section,
            context=context,
            data=workload.train_data(),
            teacher=teacher,
            stage="finetune",
            on_epoch=on_epoch,
        )
        return network, result

    return train_once


def same_weights(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def settings(**changes):
    return FinetuneConfig(**{"epochs": 3, "batch_size": 16, "learning_rate": 3e-3, **changes})


def without_seconds(history):
    return [(e.epoch, e.loss, e.metrics, e.learning_rate) for e in history]


@pytest.mark.parametrize("optimizer", list(OptimizerName))
@pytest.mark.parametrize("schedule", list(ScheduleName))
def test_every_optimizer_and_schedule_learns(run, optimizer, schedule):
    rate = 3e-2 if optimizer is OptimizerName.SGD else 3e-3
    _, result = run(settings(epochs=5, optimizer=optimizer, schedule=schedule, learning_rate=rate))
    assert result.history[-1].loss < 0.9 * result.history[1].loss
    assert result.metrics["top1"] > result.history[0].metrics["top1"]


def test_history_has_a_line_an_epoch_and_the_network_is_ready_to_use(run, workload):
    network, result = run(settings())
    assert [epoch.epoch for epoch in result.history] == [0, 1, 2, 3]
    assert all(epoch.seconds > 0 for epoch in result.history[1:])
    assert not network.training
    assert evaluate(workload, network) == result.metrics


def test_the_same_seed_gives_the_same_network_bit_for_bit(run):
    (first, one), (second, two) = run(settings()), run(settings())
    assert same_weights(first, second)
    assert without_seconds(one.history) == without_seconds(two.history)


def test_another_seed_gives_another_network(run):
    assert not same_weights(run(settings(epochs=8))[0], run(settings(epochs=8), seed=1)[0])


@pytest.mark.parametrize("optimizer", list(OptimizerName))
def test_a_run_stopped_after_an_epoch_resumes_to_the_same_network(run, optimizer):
    section = settings(optimizer=optimizer, epochs=4)
    whole, complete = run(section)

    def stop(epoch):
        if epoch.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(section, folder="stopped", on_epoch=stop)
    redone = []
    resumed, result = run(section, folder="stopped", on_epoch=lambda epoch: redone.append(epoch.epoch))
    assert redone == [3, 4]
    assert same_weights(whole, resumed)
    assert without_seconds(result.history) == without_seconds(complete.history)


def test_other_training_in_the_same_folder_does_not_resume(run):
    run(settings(), folder="shared")
    redone = []
    run(settings(learning_rate=1e-3), folder="shared", on_epoch=lambda epoch: redone.append(epoch.epoch))
    assert redone == [1, 2, 3]


def test_an_unreadable_state_starts_anew(run, tmp_path):
    whole, _ = run(settings(), folder="damaged")
    (state,) = (tmp_path / "damaged").iterdir()
    state.write_bytes(state.read_bytes()[:1000])
    again, _ = run(settings(), folder="damaged")
    assert same_weights(whole, again)


def test_training_never_hands_on_less_than_it_was_given(run, workload, tmp_path):
    trained, good = run(settings(epochs=6))
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    context = StageContext(workload, Store(tmp_path), work_dir=tmp_path / "again")
    result = train(
        trained,
        workload,
        settings(learning_rate=5.0, optimizer="sgd", gradient_clip_norm=1.0),
        context=context,
        data=workload.train_data(),
    )
    assert result.best_epoch == 0
    assert result.metrics == good.metrics
    assert all(torch.equal(before[name], tensor) for name, tensor in trained.state_dict().items())


def test_patience_stops_early(run):
    _, result = run(settings(epochs=20, learning_rate=1e-9, patience=2))
    assert result.stopped_early
    assert len(result.history) == 3


def test_the_best_epoch_follows_the_direction_of_the_metric(run, workload):
    workload.metrics = (Metric(name="error", higher_is_better=False),)
    workload.score_sample = lambda outputs, target: {
        "error": float(outputs["logits"].argmax() != int(target))
    }
    _, result = run(settings(epochs=5))
    errors = [epoch.metrics["error"] for epoch in result.history]
    assert result.metrics["error"] == min(errors) < errors[0]


def test_a_loss_that_is_not_finite_names_epoch_step_rate_and_cure(run, workload):
    workload.loss = lambda outputs, target: outputs["logits"].mean() * float("nan")
    with pytest.raises(
        TrainingError, match=r"nan in epoch 1, step 1 of 4, at learning rate 0\.003\. Lower fine"
    ) as error:
        run(settings())
    assert "finetune.learning_rate (try 0.0003)" in str(error.value)


def test_a_loss_that_blows_up_is_a_training_error(run):
    with pytest.raises(TrainingError, match="Lower"):
        run(settings(epochs=30, optimizer="sgd", learning_rate=1e18, schedule="constant"))


def test_gradient_clipping_bounds_a_step(run, workload):
    scores = iter([0.0, 1.0])
    workload.summarize = lambda records: {"top1": next(scores, 0.0)}
    start = workload.network()
    torch.manual_seed(7)
    start.load_state_dict(workload.network().state_dict())
    section = settings(epochs=1, optimizer="sgd", schedule="constant", weight_decay=0, batch_size=60)
    clipped, _ = run(section.model_copy(update={"learning_rate": 1.0, "gradient_clip_norm": 0.01}))
    moved = torch.cat(
        [(a - b).detach().flatten() for a, b in zip(clipped.parameters(), start.parameters(), strict=True)]
    )
    # One step of Nesterov momentum, with momentum 0.9, moves by 1.9 gradients.
    assert float(moved.norm()) == pytest.approx(0.019, rel=1e-3)


def test_a_users_error_is_a_workload_error(run, workload):
    def loss(outputs, target):
        raise ValueError("labels out of range")

    workload.loss = loss
    with pytest.raises(WorkloadError, match="epoch 1 failed: ValueError: labels out of range"):
        run(settings())


def test_a_metric_that_is_missing_or_undefined_is_a_workload_error(workload):
    workload.summarize = lambda records: {"map": 1.0}
    with pytest.raises(WorkloadError, match="without \\['top1'\\]"):
        evaluate(workload, workload.network())
    workload.summarize = lambda records: {"top1": float("nan")}
    with pytest.raises(WorkloadError, match="not finite"):
        evaluate(workload, workload.network())


def test_no_training_data_is_a_workload_error(run, workload):
    workload.samples = 0
    with pytest.raises(WorkloadError, match="training data are empty"):
        run(settings())


def test_a_last_batch_of_one_is_left_out(run, workload):
    workload.samples = 33
    steps = []
    run(settings(epochs=1), progress=lambda stage, done, total, text="": steps.append((done, total)))
    assert steps[-1] == (2, 2)


def test_progress_follows_steps_and_epochs(run):
    seen = []
    run(settings(epochs=2), progress=lambda *step: seen.append(step))
    assert [step[1] for step in seen] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    assert all(step[0] == "finetune" and step[2] == 8 for step in seen)
    assert "epoch 2/2" in seen[-1][3]
    assert "top1" in seen[-1][3]


def test_distillation_follows_the_teacher(run, workload):
    teacher, taught = run(settings(epochs=8))
    workload.loss = lambda outputs, target: 0 * outputs["logits"].sum()
    _, result = run(settings(epochs=8, distillation=DistillationConfig(weight=1.0)), teacher=teacher)
    assert result.metrics["top1"] > 0.5 * (result.history[0].metrics["top1"] + taught.metrics["top1"])


@pytest.mark.parametrize("section", [FinetuneConfig, QatConfig])
def test_distillation_without_a_teacher_is_a_config_error(run, section):
    with pytest.raises(ConfigError, match=r"distillation is set, but there is no teacher"):
        run(section(distillation=DistillationConfig()))


def test_distillation_loss_of_class_logits_is_the_softened_divergence():
    student, teacher = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    p, q = torch.softmax(teacher[0] / 2, 0), torch.softmax(student[0] / 2, 0)
    expected = 4 * float((p * (p / q).log()).sum()) / 2
    loss = distillation_loss({"logits": student}, {"logits": teacher}, temperature=2.0)
    assert float(loss) == pytest.approx(expected)


def test_distillation_loss_of_other_outputs_is_their_squared_error():
    outputs = {"scores": torch.zeros(2, 3), "boxes": torch.zeros(2, 4, 5), "count": torch.tensor([1, 2])}
    taught = {"scores": torch.zeros(2, 3), "boxes": torch.full((2, 4, 5), 3.0), "count": torch.tensor([1, 2])}
    assert float(distillation_loss(outputs, taught, 1.0)) == pytest.approx(9 / 2)


def test_the_moving_average_is_what_is_evaluated_and_kept(run, workload):
    plain, _ = run(settings(optimizer="sgd", schedule="constant", learning_rate=0.05))
    network, result = run(settings(optimizer="sgd", schedule="constant", learning_rate=0.05, ema_decay=0.9))
    assert evaluate(workload, network) == result.metrics
    assert not same_weights(plain, network)


def test_the_moving_average_forgets_by_its_decay():
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    average, expected = WeightAverage(network, 0.5), 0.0
    for step in range(20):
        with torch.no_grad():
            network.weight.fill_(float(step))
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    with average.applied():
        assert network.weight.item() == pytest.approx(expected, rel=1e-5)
    assert network.weight.item() == 19.0


def test_a_stopped_run_with_a_moving_average_resumes_to_the_same_network(run):
    section = settings(epochs=4, ema_decay=0.9)
    whole, _ = run(section)

    def stop(epoch):
        if epoch.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(section, folder="stopped", on_epoch=stop)
    assert same_weights(whole, run(section, folder="stopped")[0])


def test_slimming_makes_scales_smaller_and_keeps_the_last_epoch(run):
    common = {"epochs": 3, "batch_size": 16, "learning_rate": 1e-2, "schedule": "constant"}
    plain, _ = run(FinetuneConfig(**common))
    slim, result = run(SlimmingConfig(**common, strength=0.05))
    assert result.best_epoch == 3
    sums = [float(batchnorm_scales(network).detach().abs().sum()) for network in (slim, plain)]
    assert sums[0] < 0.9 * sums[1]


def test_slimming_needs_batchnorm():
    with pytest.raises(ConfigError, match=r"prune\.slimming: the network has no BatchNorm"):
        batchnorm_scales(nn.Linear(2, 2))


def test_features_follow_the_teacher_and_leave_no_hooks(run, workload):
    torch.manual_seed(1)
    teacher = workload.network()
    # equally good epochs: the last one is kept
    workload.summarize = lambda records: {"top1": 0.5}
    weights = {"weight": 1.0, "feature_weight": 100.0}
    features = {"features": ("expand", "depth*")}
    common = {"epochs": 4, "learning_rate": 1e-2}
    plain, _ = run(settings(**common, distillation=DistillationConfig(weight=1.0)), teacher=teacher)
    taught, _ = run(
        settings(**common, distillation=DistillationConfig(**weights, **features)), teacher=teacher
    )
    x = workload.train_data().inputs
    names = feature_names(features["features"], teacher, plain)
    assert names[0] == "expand"
    assert "depthwise.1" in names

    def distance(student):
        watched = [Features(network.eval(), names) for network in (student, teacher)]
        with torch.no_grad():
            student(x), teacher(x)
        for each in watched:
            each.close()
        return float(feature_loss(watched[0].seen, watched[1].seen))

    assert not any(module._forward_hooks for module in (*taught.modules(), *teacher.modules()))
    assert distance(taught) < 0.9 * distance(plain)


def test_feature_loss_compares_maps_where_channels_are_fewer():
    taught = torch.randn(2, 6, 4, 4)
    assert float(feature_loss({"a": taught}, {"a": taught})) == 0.0
    same_energy = taught.square().mean(1, keepdim=True).sqrt().expand(2, 3, 4, 4)
    assert float(feature_loss({"a": same_energy}, {"a": taught})) == pytest.approx(0.0, abs=1e-6)
    assert float(feature_loss({"a": same_energy.flip(2)}, {"a": taught})) > 0.01
    with pytest.raises(ConfigError, match=r"'a' returns \(2, 6\) where the baseline's returns \(2, 8\)"):
        feature_loss({"a": torch.randn(2, 6)}, {"a": torch.randn(2, 8)})


def test_features_that_match_nothing_name_the_nearest(workload):
    network = workload.network()
    with pytest.raises(ConfigError, match=r"distillation\.features: 'expnd' .*Nearest: expand"):
        feature_names(["expnd"], network, network)


def test_schedules_start_peak_and_end_where_they_should():
    def rates(schedule):
        return [
            learning_rate_at(settings(schedule=schedule, learning_rate=1.0), step, 100) for step in range(100)
        ]

    assert set(rates("constant")) == {1.0}
    cosine = rates("cosine")
    assert (cosine[0], cosine[50]) == (1.0, pytest.approx(0.5))
    assert cosine == sorted(cosine, reverse=True)
    one_cycle = rates("one_cycle")
    assert one_cycle[0] == pytest.approx(1 / 25)
    assert one_cycle.index(max(one_cycle)) == 30
    assert max(one_cycle) == pytest.approx(1.0)
    assert one_cycle[-1] < 1e-3


def test_one_cycle_is_that_of_pytorch():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=1000, cycle_momentum=False
    )
    for step in range(1000):
        ours = learning_rate_at(TrainConfig(schedule="one_cycle", learning_rate=1.0), step, 1000)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], abs=0.01)
        optimizer.step()
        if step < 999:
            theirs.step()
