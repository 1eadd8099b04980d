"""What ``prefect deploy --all`` registers: flows that exist, with a form that explains itself."""

from importlib import import_module

import pytest
import yaml
from conftest import ROOT
from prefect.server.events.schemas.automations import Automation
from prefect.server.events.schemas.events import RelatedResource, Resource
from prefect.utilities.callables import parameter_schema

PROJECT = yaml.safe_load((ROOT / "prefect.yaml").read_text())
AUTOMATIONS = {
    automation["name"]: automation
    for automation in yaml.safe_load((ROOT / "configs/automations.yaml").read_text())["automations"]
}
DEPLOYMENTS = {deployment["name"]: deployment for deployment in PROJECT["deployments"]}


def flow_of(deployment):
    module, _, name = deployment["entrypoint"].rpartition(".")
    return getattr(import_module(module), name)


def test_deploy_and_nightly_can_be_scheduled():
    assert sorted(DEPLOYMENTS) == ["deploy", "nightly"]
    assert all(deployment["schedules"] for deployment in DEPLOYMENTS.values())


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_the_form_says_what_each_parameter_is_and_takes_the_deployments_own(name):
    flow, given = flow_of(DEPLOYMENTS[name]), DEPLOYMENTS[name]["parameters"]
    properties = parameter_schema(flow).model_dump()["properties"]
    assert [
        key for key, told in properties.items() if not told.get("description") and "$ref" not in told
    ] == []
    assert set(given) <= set(properties)
    flow.validate_parameters(given)


@pytest.mark.parametrize("name", DEPLOYMENTS)
@pytest.mark.parametrize("automation", AUTOMATIONS)
def test_a_zombie_is_called_crashed_within_two_minutes(automation, name):
    trigger = Automation.model_validate(AUTOMATIONS[automation]).trigger
    heartbeat_s = int(
        DEPLOYMENTS[name]["work_pool"]["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]
    )
    assert 2 * heartbeat_s <= trigger.within.total_seconds() <= 100
    deployed = [
        {
            "prefect.resource.role": "tag",
            "prefect.resource.id": f"prefect.tag.{DEPLOYMENTS[name]['tags'][0]}",
        },
        {"prefect.resource.role": "deployment", "prefect.resource.id": "prefect.deployment.any"},
    ]
    flow_run = {"prefect.resource.id": "prefect.flow-run.any"}
    assert trigger.covers_resources(Resource(flow_run), [RelatedResource(one) for one in deployed])
