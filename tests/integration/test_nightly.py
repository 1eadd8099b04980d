"""Nights of a small recipe, through the command: a real target over SSH, a real Prefect server, MLflow on sqlite."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
import yaml
from conftest import readme_block
from prefect.settings import PREFECT_API_URL, temporary_settings

from jetway.flows.server import running_server, start_server
from jetway.tasks.tracking.registry import model_name
from jetway.tasks.tracking.tracker import Tracker
from jetway.tasks.tracking.values import PARENT_TAG
from jetway.tasks.verdict import LOOKS

pytestmark = [pytest.mark.team, pytest.mark.filterwarnings("default")]

NAME = "nights"
WORKLOAD = """
from torch import nn
from my_package.my_module import MyWorkload


class Deep(MyWorkload):
    def __init__(self, layers=2):
        self.layers = layers

    def network(self):
        convolutions = [layer for _ in range(self.layers) for layer in (nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())]
        stem = nn.Conv2d(1, 32, 3, padding=1)
        return nn.Sequential(stem, *convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
"""
BROKEN = """
from my_package.deep import Deep


class Broken(Deep):
    def loss(self, outputs, target):
        raise RuntimeError("as asked")
"""
RECIPE = {
    "name": NAME,
    "workload": {"class_path": "my_package.deep:Deep"},
    "train": {"epochs": 1},
    "variants": ["baseline-fp32"],
    "targets": ["loopback"],
    "benchmark": {"min_duration_s": 0.3, "min_queries": 50},
}
EVENT_TIMEOUT_S = 60


@pytest.fixture
def nights(project, jetway_here):
    """Runs a command in a project with a recipe of one variant, whose depth is an option."""
    (project / "my_package/deep.py").write_text(WORKLOAD)
    (project / "nights.yaml").write_text(yaml.safe_dump(RECIPE))
    return lambda *arguments: jetway_here(*arguments, cwd=project)


@pytest.fixture
def broken(project):
    """A recipe whose training fails."""
    recipe = RECIPE | {"name": "broken", "workload": {"class_path": "my_package.broken:Broken"}}
    (project / "broken.yaml").write_text(yaml.safe_dump(recipe))
    (project / "my_package/broken.py").write_text(BROKEN)
    return "broken.yaml"


def layers(count):
    return "--set", f"workload.options.layers={count}"


@pytest.fixture
def api(cli_home):
    """The Prefect server of the commands."""
    with start_server(home=cli_home) as server:
        server.wait_ready()
        yield running_server(home=cli_home).api_url


@pytest.fixture
def hook():
    """A web address and what was posted to it."""
    posted = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            posted.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/hook", posted
        server.shutdown()


def wait_until(found):
    deadline = time.monotonic() + EVENT_TIMEOUT_S
    while not (value := found()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return value


def changes(row):
    return {one["metric"]: one["change"] for one in row["compared"]["metrics"]}


def test_first_night_and_a_regression(nights, broken, api, hook, tmp_path):
    first = nights("nightly", broken, "nights.yaml", "--promote", "never", "--json")
    failed, new = first.json["rows"]
    assert (failed["status"], first.exit_code) == ("FAILED", 4)
    assert "as asked" in failed["error"]
    assert first.json["message"].startswith("FAILED: broken on loopback (")
    assert new["status"] == "NEW"
    advice = f"jetway promote {new['run_id'][:8]} --target loopback --variant baseline-fp32"
    assert new["notes"] == [f"to make it champion: {advice}"]
    assert Tracker().champion(model_name(NAME, "loopback")) is None

    assert nights(*advice.split()[1:]).exit_code == 0
    champion = Tracker().champion(model_name(NAME, "loopback"))
    assert champion.run_id == new["run_id"]

    address, posted = hook
    with temporary_settings({PREFECT_API_URL: api}):
        example = readme_block("automation example").replace(
            "https://chat.example.org/hooks/nightly", address
        )
        exec(compile(example, "README.md", "exec"), {})
    second = nights("nightly", "nights.yaml", "--budget-minutes", "0.01", "--json", *layers(4))
    (worse,) = second.json["rows"]
    assert (worse["status"], second.exit_code) == ("REGRESSED", 1), second.stderr
    assert changes(worse)["size_bytes"] == changes(worse)["macs"] == "REGRESSED"
    assert changes(worse)["latency_ms_p50"] == "UNKNOWN", "the budget ends before there is evidence"
    check_prefect(api, worse, second.json["message"])
    assert wait_until(lambda: posted), "the automation did not call the webhook"
    assert json.loads(posted[0])["text"].startswith("REGRESSED: nights on loopback (params ")
    check_record(second.json, tmp_path)


def check_prefect(api, row, message):
    """The flow run is red, its artifact and its event are there."""
    with httpx.Client(base_url=api) as client:
        (flow,) = client.post("/flow_runs/filter", json={"limit": 1, "sort": "START_TIME_DESC", "flows": {
            "name": {"any_": ["nightly"]}}}).json()  # fmt: skip
        assert (flow["state"]["type"], flow["state"]["message"]) == ("FAILED", message)
        artifact = client.get("/artifacts/nightly-nights-loopback/latest").json()
        assert "| size_bytes |" in artifact["data"]
        wanted = {"filter": {"event": {"name": ["jetway.verdict.regressed"]}}}
        (event,) = wait_until(lambda: client.post("/events/filter", json=wanted).json()["events"])
    assert event["resource"]["prefect.resource.id"] == "jetway.recipe.nights.loopback"
    assert event["payload"]["verdicts"] == changes(row)


def check_record(document, tmp_path):
    """The night and its comparison in MLflow, with links to both runs."""
    tracker = Tracker()
    run = tracker.run(document["run_id"])
    assert (run.tags["verdict"], run.tags["exit_code"]) == ("REGRESSED", "1")
    (child,) = tracker.search(f"tags.`{PARENT_TAG}` = '{run.run_id}'")
    assert child.tags["verdict"] == "REGRESSED"
    assert child.metrics["size_bytes"] > 0
    page = tracker.load_file(run.run_id, "nightly.html", tmp_path).read_text()
    assert "top1, night by night" in page
    assert "size_bytes, night by night" in page, "it changed"
    (row,) = document["rows"]
    for linked in (row["run_id"], row["champion"]["run_id"]):
        assert tracker.page_of_run(linked) in child.tags["mlflow.note.content"]


@pytest.mark.slow
@pytest.mark.serial
def test_the_same_engine_and_a_slower_one(nights):
    """A tenth more layers, found on the clock by fresh processes in turns."""
    nights("nightly", "nights.yaml", "--promote", "never", *layers(20))
    assert nights("promote", "latest").exit_code == 0
    same = nights("nightly", "nights.yaml", "--json", *layers(20))
    (row,) = same.json["rows"]
    assert row["status"] == "SAME"
    assert {one["reason"] for one in row["compared"]["metrics"]} == {"", "the same engine file"}
    assert same.exit_code == (0 if row["candidate"]["validity"]["valid"] else 5)

    (row,) = nights("nightly", "nights.yaml", "--budget-minutes", "5", "--json", *layers(22)).json["rows"]
    latency = next(one for one in row["compared"]["metrics"] if one["metric"] == "latency_ms_p50")
    if latency["evidence"]["count"] < min(LOOKS):
        pytest.skip(f"{latency['evidence']['count']} calm pairs")
    assert latency["change"] == "REGRESSED"
    assert 0.05 < latency["evidence"]["effect"] < 0.15
