"""Champions in MLflow's model registry: what ships of a recipe on a class of targets, and what shipped before."""

from __future__ import annotations

from collections.abc import Mapping

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from pydantic import BaseModel, ConfigDict, Field

from jetway.tasks.tracking.connection import one_at_a_time
from jetway.tasks.tracking.values import PARENT_TAG, short_tags

CHAMPION = "champion"
RUN_TAG = "run_id"


class Champion(BaseModel):
    """A version of a registered model that has, or had, the alias ``champion``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    version: int
    run_id: str = Field(description="Of the pipeline run that made it.")
    variant: str
    target: str = Field(description="Where it was built and measured.")

    @property
    def title(self) -> str:
        return f"{self.model} version {self.version} ({self.variant} of run {self.run_id[:8]})"


def model_name(recipe: str, target_class: str) -> str:
    """One registered model a recipe and class of targets, such as ``digits.loopback``."""
    return f"{recipe}.{target_class}"


class Registry:
    """The tracker's part for champions. Versions are the champions of today and of earlier days, and nothing else."""

    def __init__(self, client: MlflowClient, uri: str) -> None:
        self._client = client
        self._uri = uri

    def champion(self, model: str) -> Champion | None:
        """What the alias stands at; None before the first promotion."""
        found = self._client.search_registered_models(f"name = '{model}'", max_results=1)
        version = found[0].aliases.get(CHAMPION) if found else None
        return _champion(self._client.get_model_version(model, str(version))) if version else None

    def champions(self) -> list[Champion]:
        """All of them."""
        names = [found.name for found in self._client.search_registered_models(max_results=1000)]
        return [champion for name in names if (champion := self.champion(name))]

    def promote(self, model: str, child_id: str, description: str, tags: Mapping[str, str]) -> Champion:
        """Moves the alias to the run of a variant, whose files become the version's.

        A run that was promoted before keeps its version. ``tags`` are kept beside the variant's own.
        """
        self._make_model(model)
        version = self._version_of(model, child_id) or self._make_version(model, child_id)
        for key, value in short_tags(tags).items():
            self._client.set_model_version_tag(model, version.version, key, value)
        self._client.update_model_version(model, version.version, description)
        self._client.set_registered_model_alias(model, CHAMPION, version.version)
        return _champion(version)

    def _make_model(self, model: str) -> None:
        with one_at_a_time(self._uri):
            if not self._client.search_registered_models(f"name = '{model}'", max_results=1):
                about = "What ships of a recipe on a class of targets. The alias champion stands at today's."
                self._client.create_registered_model(model, description=about)

    def _version_of(self, model: str, child_id: str) -> ModelVersion | None:
        found = self._client.search_model_versions(f"name = '{model}' AND run_id = '{child_id}'")
        return found[0] if found else None

    def _make_version(self, model: str, child_id: str) -> ModelVersion:
        run = self._client.get_run(child_id)
        known = ("recipe", "variant", "precision", "target", "engine", "board", "simulated")
        tags = {key: run.data.tags[key] for key in known if key in run.data.tags}
        tags[RUN_TAG] = run.data.tags[PARENT_TAG]
        return self._client.create_model_version(
            model, run.info.artifact_uri, child_id, tags=tags, await_creation_for=0
        )


def _champion(version: ModelVersion) -> Champion:
    return Champion(
        model=version.name,
        version=int(version.version),
        run_id=version.tags[RUN_TAG],
        variant=version.tags["variant"],
        target=version.tags["target"],
    )
