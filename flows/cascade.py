"""The second half of a cascade: the classifier's host stages as a run of their own, and both engines on a target."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from jetway.configs.schema import Backend, Variant
from jetway.flows.pipeline import Pipeline, SecondObserver, classifier_recipe, recording
from jetway.flows.record import Measured
from jetway.tasks.artifacts import OnnxModel
from jetway.tasks.build import build
from jetway.tasks.cascade import cascade
from jetway.tasks.cascade_unit import Behind


def open_classifier(run: Pipeline) -> AbstractContextManager[Pipeline | None]:
    """The pipeline of the recipe's classifier, with the variants and targets of the detector; None without one."""
    if run.recipe.cascade is None:
        return nullcontext()
    recipe, path = classifier_recipe(run.recipe, run.path)
    return recording(Pipeline(recipe, path, run.targets, run.tracker, SecondObserver(run.observer)))


def run_cascade(
    run: Pipeline,
    classifier: Pipeline,
    models: Mapping[tuple[Backend, Variant], OnnxModel],
    measured: Measured,
) -> Measured:
    """Builds the classifier's engines on the target, and sends frames through those of each variant."""
    assert run.recipe.cascade is not None
    target, recipe = measured.target, classifier.recipe
    own = {variant.name: models[target.backend(variant), variant] for variant in recipe.variants}
    engines = {
        variant.name: build(
            classifier.context,
            target,
            own[variant.name],
            recipe.build,
            recipe.tensorrt,
            backend=target.backend(variant),
            variant=variant.name,
        )
        for variant in recipe.variants
    }
    result = cascade(
        run.context,
        classifier.context,
        target,
        dict(measured.engines),
        engines,
        run.recipe.cascade,
        run.recipe.benchmark,
    )
    behind = {
        name: Behind(classifier.context, engines[name], model, run.recipe.cascade)
        for name, model in own.items()
    }
    return replace(measured, cascade=result, behind=behind)
