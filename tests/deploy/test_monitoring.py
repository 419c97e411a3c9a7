"""Alerts and dashboard, with the real promtool, and with a real Prometheus over a real server."""

import json
import os
import re
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from server import EmbeddedServer
from server.checks import Listener, choose_ports
from tests.helpers.job_calls import generate
from tests.helpers.prometheus import find_program
from tests.helpers.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "deploy/prometheus/alerts.yml"
RULE_TESTS = ROOT / "deploy/prometheus/alerts_test.yml"
CONFIG = ROOT / "deploy/prometheus/prometheus.yml"
DASHBOARD = ROOT / "deploy/grafana/audioldm2.json"
RUNBOOK = ROOT / "docs/runbook.md"
TIMEOUT_S = 60

VARIABLES = {"$instance": ".*", "$model": ".*", "$__rate_interval": "1m", "$__range": "1h"}
METRIC = re.compile(r"\b((?:audioldm2|nv|envoy)_\w+|up)\b(?!\s*\()(\{[^}]*\})?")
GROUPING = re.compile(r"\b(?:by|on)\s*\(([^)]*)\)")
MADE_LABELS = {"le"}
"""Of histograms, which every one of them has."""
GPU = "nv_gpu_"
"""Without a GPU these aren't there."""


def require(name: str) -> Path:
    """The program, or why there is none."""
    if program := find_program(name):
        return program
    reason = f"no {name} on this machine, and `make .venv/prometheus/promtool` couldn't get one (it takes apt-get)"
    if os.environ.get("PROMETHEUS_TESTS") == "required":
        pytest.fail(reason)
    pytest.skip(reason)


def alerts() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def dashboard_expressions() -> list[str]:
    """Every expression of the dashboard, its variables replaced by what chooses everything."""
    found = []

    def search(node: object) -> None:
        if isinstance(node, dict):
            found.extend([node["expr"]] if "expr" in node else [])
            for value in node.values():
                search(value)
        elif isinstance(node, list):
            for value in node:
                search(value)

    search(json.loads(DASHBOARD.read_text()))
    for variable, value in VARIABLES.items():
        found = [expression.replace(variable, value) for expression in found]
    return found


def variable_queries() -> list[str]:
    variables = json.loads(DASHBOARD.read_text())["templating"]["list"]
    return [variable["query"]["query"] for variable in variables if variable["type"] == "query"]


@pytest.mark.parametrize(
    "command", [["check", "rules", str(RULES)], ["check", "config", str(CONFIG)], ["test", "rules", str(RULE_TESTS)]]
)
def test_promtool_finds_nothing_wrong(command):
    done = subprocess.run([require("promtool"), *command], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_was_seen_to_speak_and_to_be_silent():
    expected: dict[str, set[bool]] = {}
    for test in yaml.safe_load(RULE_TESTS.read_text())["tests"]:
        for case in test["alert_rule_test"]:
            expected.setdefault(case["alertname"], set()).add(bool(case["exp_alerts"]))
    assert expected == {alert["alert"]: {True, False} for alert in alerts()}


def test_each_alert_has_its_section_in_the_runbook():
    headings = {
        "#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", RUNBOOK.read_text(), re.MULTILINE)
    }
    for alert in alerts():
        file, _, anchor = alert["annotations"]["runbook"].partition("#")
        assert (ROOT / file, f"#{anchor}") == (RUNBOOK, f"#{alert['alert'].lower()}")
        assert f"#{anchor}" in headings, alert["alert"]


def test_panels_do_not_overlap_and_have_their_own_ids():
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) == 23


class Prometheus:
    """A running Prometheus, asked over its API."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **parameters: str) -> Any:
        query = urllib.parse.urlencode({name.replace("match", "match[]"): value for name, value in parameters.items()})
        url = f"{self.url}/api/v1/{path}?{query}"
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:  # noqa: S310
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                answer = json.load(error)
        assert answer["status"] == "success", f"{parameters}: {answer}"
        assert not answer.get("warnings"), f"{parameters}: {answer['warnings']}"
        return answer["data"]

    def jobs_that_are_up(self) -> set[str]:
        try:
            return {result["metric"]["job"] for result in self.get("query", query="up == 1")["result"]}
        except (OSError, ValueError):  # it is starting
            return set()


@pytest.fixture(scope="module")
def prometheus(triton: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It scrapes the server as deploy/prometheus/prometheus.yml says, once a second."""
    program = require("prometheus")
    generate(triton, "seen by Prometheus", num_inference_steps=2, audio_length_in_s=0.04)
    folder = tmp_path_factory.mktemp("prometheus")
    config = CONFIG.read_text().replace("localhost:8002", triton.metrics_url).replace("15s", "1s")
    (folder / "prometheus.yml").write_text(config.replace("alerts.yml", str(RULES)))
    (port,) = choose_ports([Listener("--web", "127.0.0.1", 0)])
    command = [
        *(program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"),
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        running = Prometheus(f"http://127.0.0.1:{port}")
        jobs = {job["job_name"] for job in yaml.safe_load(config)["scrape_configs"]}
        wait_until(lambda: running.jobs_that_are_up() == jobs, TIMEOUT_S, f"{jobs} are up: {folder}/log")
        yield running
    finally:
        process.terminate()
        process.wait(TIMEOUT_S)


def test_prometheus_evaluates_every_rule(prometheus):
    def rules() -> list[dict[str, Any]]:
        return [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]

    wait_until(lambda: all(rule["health"] != "unknown" for rule in rules()), TIMEOUT_S, "all rules are evaluated")
    assert [rule["name"] for rule in rules()] == [alert["alert"] for alert in alerts()]
    assert [rule for rule in rules() if rule["health"] != "ok"] == []


def test_a_server_that_is_well_raises_no_alert(prometheus):
    def raised() -> set[str]:
        names = {alert["labels"]["alertname"] for alert in prometheus.get("alerts")["alerts"]}
        return names - {"AudioLDM2MachineMemory"}  # of the machine that runs the tests

    # The rules may be evaluated for the first time before anything is scraped.
    wait_until(lambda: raised() == set(), TIMEOUT_S, "no alert is pending")


@pytest.mark.parametrize("expression", dashboard_expressions())
def test_prometheus_evaluates_every_query_of_the_dashboard(prometheus, expression):
    prometheus.get("query", query=expression)


@pytest.mark.parametrize("expression", [*dashboard_expressions(), *(alert["expr"] for alert in alerts())])
def test_the_server_has_every_metric_and_label_that_is_asked_for(prometheus, expression):
    labels = set(MADE_LABELS)
    is_there = False
    for name, selector in METRIC.findall(GROUPING.sub("", expression)):
        if name.startswith(GPU):
            return
        is_there = True
        assert prometheus.get("series", match=f"{name}{selector}"), f"no {name}{selector}"
        for series in prometheus.get("series", match=name):
            labels |= set(series)
    assert is_there, f"no metric in {expression}"
    for group in GROUPING.findall(expression):
        asked = {label.strip() for label in group.split(",")}
        assert asked <= labels, f"no {asked - labels} in {expression}"


@pytest.mark.parametrize("query", variable_queries())
def test_the_variables_of_the_dashboard_have_values(prometheus, query):
    metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", query).groups()
    assert any(label in series for series in prometheus.get("series", match=metric)), query
