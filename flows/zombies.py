"""Runs whose process is gone: MLflow and Prefect are told how they ended, by the next run of this home.

A process that is killed tells nobody, and one that outlives its Prefect server cannot tell that. Of runs of
this machine the process itself is looked up. Of other machines' Prefect knows more: automations
(``configs/automations.yaml``) call a flow run crashed that has no heartbeat, or never began. What stays pending
without an automation, because it comes from a command, is ended here, whatever machine it is of.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from uuid import UUID

from httpx import HTTPError
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.context import TagsContext
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.states import Completed, Crashed, Failed

from jetway.tasks import environment
from jetway.tasks.tracking.tracker import Tracker
from jetway.tasks.tracking.values import HOST_TAG, KIND_TAG, RunRecord

logger = logging.getLogger("jetway")

#: Ties a run in MLflow to its flow run in Prefect.
FLOW_RUN_TAG = "prefect.flow_run_id"
FLOW_RUNS_ASKED = 200
#: The automation looks after flow runs with this tag; those of deployments have it from ``prefect.yaml``.
TEAM_TAG = "jetway"
PROCESS_TAGS = "process:"
NEWEST = FlowRunSort.START_TIME_DESC
TOLD = "Its process is gone; this is what MLflow says of its end."
TWICE = "Made twice: Prefect's server died before it answered, and was asked again."
NEVER_BEGAN = "It did not begin in time: what was to run it is gone."
#: A flow run begins at once; another thread's may just be about to.
PENDING_S = 2.0
#: One that a worker starts begins when its process has imported what it needs.
BEGIN_S = 90.0
#: What a flow run must have become whose run ended so in MLflow.
STATES: dict[str, Callable[..., State]] = {"FINISHED": Completed, "FAILED": Failed, "KILLED": Crashed}


#: What is a flow run of its own.
KINDS = ("pipeline", "nightly")
RUNNING = f"attributes.status = 'RUNNING' AND tags.`{KIND_TAG}` = '{{}}'"


def end_zombies(tracker: Tracker) -> None:
    """Ends what is still called running and is not. A Prefect server that does not answer is left alone."""
    tracker.reap()
    try:
        with get_client(sync_client=True) as client:
            _tell_prefect(tracker, client)
            _tell_mlflow(tracker, client)
    except (HTTPError, PrefectException) as exc:
        logger.warning("Prefect was not asked for runs whose process is gone: %s", exc)


def process_tag() -> str:
    """Names this process and its machine, for a flow run that dies before it has a run in MLflow."""
    return f"{_machine()}{environment.process_id()}"


@contextmanager
def without_process_tag() -> Iterator[None]:
    """For the tasks of a flow: before each one with a tag Prefect asks its server for a limit of that tag."""
    with TagsContext(current_tags=TagsContext.get().current_tags - {process_tag(), TEAM_TAG}):
        yield


def _machine() -> str:
    digest = hashlib.sha256(f"{environment.host_id()} {environment.boot_id()}".encode()).hexdigest()
    return f"{PROCESS_TAGS}{digest[:8]}:"


def _tell_prefect(tracker: Tracker, client: SyncPrefectClient) -> None:
    alive = FlowRunFilterStateType(any_=[StateType.PENDING, StateType.RUNNING])
    query = FlowRunFilter(state=FlowRunFilterState(type=alive))
    for flow_run in client.read_flow_runs(flow_run_filter=query, sort=NEWEST, limit=FLOW_RUNS_ASKED):
        if reason := _why_it_never_begins(flow_run):
            client.set_flow_run_state(flow_run.id, Crashed(message=reason), force=True)
            continue
        found = tracker.search(f"tags.`{FLOW_RUN_TAG}` = '{flow_run.id}'", limit=1)
        if _process_died(flow_run) or (found and tracker.is_abandoned(found[0])):
            state = STATES[found[0].status if found and found[0].status in STATES else "KILLED"]
            client.set_flow_run_state(flow_run.id, state(message=TOLD), force=True)


def _why_it_never_begins(flow_run: FlowRun) -> str:
    """Empty for one that has begun, or still may."""
    pending_s = _pending_s(flow_run)
    # This process asks from within its flow run, which is running then.
    if process_tag() in flow_run.tags and pending_s > PENDING_S:
        return TWICE
    return NEVER_BEGAN if _is_ours(flow_run) and pending_s > BEGIN_S else ""


def _pending_s(flow_run: FlowRun) -> float:
    state = flow_run.state
    if state is None or not state.is_pending():
        return 0.0
    return (datetime.now(UTC) - state.timestamp).total_seconds()


def _is_ours(flow_run: FlowRun) -> bool:
    return any(tag == TEAM_TAG or tag.startswith(PROCESS_TAGS) for tag in flow_run.tags)


def _process_died(flow_run: FlowRun) -> bool:
    processes = [tag.removeprefix(_machine()) for tag in flow_run.tags if tag.startswith(_machine())]
    return any(not environment.process_alive(process) for process in processes)


def _tell_mlflow(tracker: Tracker, client: SyncPrefectClient) -> None:
    for run in (run for kind in KINDS for run in tracker.search(RUNNING.format(kind))):
        lives = run.tags.get(HOST_TAG) == environment.host_id() and not tracker.is_abandoned(run)
        if not lives and FLOW_RUN_TAG in run.tags and _has_crashed(client, run):
            tried = tracker.fallbacks(run.run_id)
            below = [child for one in (*tried, run) for child in tracker.children(one.run_id)]
            for one in (*below, *tried, run):
                if one.status == "RUNNING":
                    tracker.finish(one.run_id, "KILLED")


def _has_crashed(client: SyncPrefectClient, run: RunRecord) -> bool:
    try:
        state = client.read_flow_run(UUID(run.tags[FLOW_RUN_TAG])).state
    except ObjectNotFound:
        return False
    return state is not None and (state.is_crashed() or state.is_cancelled())
