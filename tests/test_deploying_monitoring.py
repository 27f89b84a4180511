"""The dashboard and the alert rules that `traceserve deploy kubernetes` writes: every query is of what a real server counts."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Dict, Iterator, List, Set, Tuple

import pytest
import yaml
from test_deploying import deployed
from traceserve.serving import client, configuration, instances, server

# Of PromQL, what is a name and no metric's.
_WORDS = {
    "sum",
    "max",
    "histogram_quantile",
    "rate",
    "increase",
    "changes",
    "label_replace",
    "by",
    "on",
    "label_values",
    "count",
    "absent",
    "last_over_time",
    "and",
    "or",
    "unless",
}
# Of Prometheus itself, which knows them of every target.
_METRICS, _LABELS = {"up"}, {"job", "instance"}


@pytest.fixture(scope="module")
def page(mar: Path) -> Iterator[str]:
    """/metrics of a server that has answered one request and refused another."""
    instance = server.start([mar], port=configuration.free_ports(1)[0], timeout=180)
    try:
        for body in ({"text": "Yes."}, {"txt": "Yes."}):
            try:
                client.predict(instance.address, "tiny", body)
            except client.RequestRefused as error:
                assert error.status == 400
        deadline = time.monotonic() + 20
        text = ""
        while time.monotonic() < deadline and not {"Requests4XX", "traceserve_windows_total"} <= set(samples(text)):
            with urllib.request.urlopen(f"http://127.0.0.1:{instance.metrics_port}/metrics", timeout=10) as response:
                text = response.read().decode()
            time.sleep(0.1)
        yield text
    finally:
        instances.stop(instance, at_once=True)


def samples(page: str) -> Dict[str, Set[str]]:
    """The labels of each metric that has a sample."""
    found: Dict[str, Set[str]] = {}
    for name, labels in re.findall(r"^(\w+)\{(.*)\} \S+$", page, re.MULTILINE):
        found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    return found


@pytest.fixture(scope="module")
def files(mar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deployed("kubernetes", [mar], tmp_path_factory.mktemp("monitoring") / "out") / "monitoring"


def queries(files: Path) -> List[str]:
    """Every query of the dashboard and of the rules."""
    rules = yaml.safe_load((files / "alerts.yaml").read_text())
    found = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    dashboard = json.loads((files / "dashboard.json").read_text())
    found += [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return found + [each["definition"] for each in dashboard["templating"]["list"] if "definition" in each]


def bare(query: str) -> str:
    """A query without texts in quotes and spans of time."""
    return re.sub(r'"[^"]*"|\[[^\]]*\]', "", query)


def metrics(query: str) -> Set[str]:
    without_labels = re.sub(r"\b(by|on) \([^)]*\)|\{[^}]*\}|, \w+\)$", "", bare(query))
    return set(re.findall(r"[A-Za-z_]\w+", without_labels)) - _WORDS - {"e6"}


def labels(query: str) -> Set[str]:
    grouped = re.findall(r"\b(?:by|on) \(([^)]*)\)", bare(query))
    matched = re.findall(r"\{(\w+)", bare(query))
    return {name for group in grouped for name in re.split(r",\s*", group)} | set(matched)


def test_every_metric_and_label_is_a_real_servers(page: str, files: Path) -> None:
    counted = _METRICS | set(re.findall(r"^# TYPE (\w+) ", page, re.MULTILINE))
    counted |= {f"{name}_bucket" for name in re.findall(r"^# TYPE (\w+) histogram", page, re.MULTILINE)}
    known = _LABELS | {label for names in samples(page).values() for label in names}
    asked: Set[str] = set()
    for query in queries(files):
        assert metrics(query) and metrics(query) <= counted, query
        assert labels(query) <= known, query
        asked |= {name[: -len("_bucket")] if name.endswith("_bucket") else name for name in metrics(query)}
    own = {name for name in counted if name.startswith("traceserve_") and not name.endswith("_bucket")}
    assert asked >= own - {"traceserve_micro_batches_total"}
    assert "ts_queue_latency_microseconds" in asked and "Requests5XX" in asked


def test_a_metric_that_is_not_there_is_found() -> None:
    """Else the test above could not fail."""
    query = 'sum by (ModelName) (rate(TraceserveTokens{ModelName=~"$model"}[5m])) / 1e6 > 0.5'
    assert metrics(query) == {"TraceserveTokens"} and labels(query) == {"ModelName"}


def test_the_workers_metrics_follow_the_conventions(page: str) -> None:
    """Of Prometheus: counters end in _total, in base units; and each has a help and a type."""
    kinds = dict(re.findall(r"^# TYPE (traceserve_\w+) (\w+)$", page, re.MULTILINE))
    assert len(kinds) == 11
    for name, kind in kinds.items():
        assert name.endswith("_total") == (kind == "counter"), name
        assert re.search(rf"^# HELP {name} .", page, re.MULTILINE)
        assert not re.search(r"micro(?!_batches)|milli|percent|[A-Z]", name)


def promtool() -> str:
    found = shutil.which("promtool", path=os.environ["PATH"])
    if found is None:
        pytest.skip("promtool is not installed (of Debian's package prometheus)")
    return found


def test_promtool_accepts_the_rules(files: Path, tmp_path: Path) -> None:
    """The dashboard's queries, too, as those of rules."""
    dashboard = json.loads((files / "dashboard.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    spans = [re.sub(r"\$\w+", "5m", query) for query in asked]
    rules = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(spans)]
    (tmp_path / "panels.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    for file, count in ((files / "alerts.yaml", 9), (tmp_path / "panels.yaml", len(rules))):
        result = subprocess.run([promtool(), "check", "rules", str(file)], stdout=subprocess.PIPE, text=True)
        assert result.returncode == 0 and f"SUCCESS: {count} rules found" in result.stdout, result.stdout


A = 'job="demo",instance="10.0.0.1:8082"'
# What is counted minute by minute, and which alerts fire after an hour, with the labels by which one knows whose.
OUTAGES: Dict[str, Tuple[Dict[str, str], Dict[str, List[Dict[str, str]]]]] = {
    "all is well": ({f"Requests2XX{{{A}}}": "0+60x60", f"up{{{A}}}": "1x60"}, {}),
    "its target does not answer": (
        {f"Requests2XX{{{A}}}": "0+60x20 stale", f"up{{{A}}}": "1x20 0x40"},
        {"TraceserveDown": [{"job": "demo", "instance": "10.0.0.1:8082"}], "TraceserveGone": [{"job": "demo"}, {}]},
    ),
    "its target is gone, others' are not": (
        {f"Requests2XX{{{A}}}": "0+60x20 stale", "Requests2XX{job='other'}": "0+60x60", f"up{{{A}}}": "1x20 stale"},
        {"TraceserveGone": [{"job": "demo"}]},
    ),
    "there was never one": ({"up{job='node'}": "0x60"}, {"TraceserveGone": [{}]}),
    "a pod in the place of another": (
        {f"Requests2XX{{{A}}}": "0+60x20 stale", "Requests2XX{job='demo',instance='b'}": "_x18 0+60x60"},
        {},
    ),
    "it answers with errors alone": (
        {"Requests5XX{job='demo',Hostname='a'}": "0+60x60", "Requests2XX{job='other',Hostname='b'}": "0+60x60"},
        {"TraceserveErrors": [{"Hostname": "a"}]},
    ),
    "it counts nothing more": (
        {f"Requests2XX{{{A},Hostname='a'}}": "0+60x20 1200x40"},
        {"TraceserveAnswersNothing": [{"Hostname": "a"}]},
    ),
}


@pytest.mark.parametrize("outage", OUTAGES)
def test_a_critical_alert_fires_if_nothing_answers(files: Path, outage: str, tmp_path: Path) -> None:
    counted, expected = OUTAGES[outage]
    rules = yaml.safe_load((files / "alerts.yaml").read_text())["groups"][0]["rules"]
    critical = [rule for rule in rules if rule["labels"]["severity"] == "critical"]
    for rule in critical:
        del rule["annotations"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "critical", "rules": critical}]}))
    fired = [
        {
            "eval_time": "59m",
            "alertname": name,
            "exp_alerts": [{"exp_labels": {"severity": "critical", **labels}} for labels in expected.get(name, ())],
        }
        for name in sorted({rule["alert"] for rule in critical} | set(expected))
    ]
    series = [{"series": name, "values": values} for name, values in counted.items()]
    test = {"interval": "1m", "input_series": series, "alert_rule_test": fired}
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "tests": [test]}))
    command = [promtool(), "test", "rules", "test.yaml"]
    result = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout


def test_promtool_accepts_the_workers_metrics(page: str) -> None:
    own = "".join(f"{line}\n" for line in page.splitlines() if re.search(r"\btraceserve_\w+", line))
    command = [promtool(), "check", "metrics"]
    result = subprocess.run(command, input=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    # TorchServe itself adds the labels ModelName, Level and Hostname to whatever a worker counts.
    of_torchserve = "label names should be written in 'snake_case' not 'camelCase'"
    assert not [line for line in result.stdout.splitlines() if not line.endswith(of_torchserve)], result.stdout


def test_the_dashboards_panels_stand_beside_each_other(files: Path) -> None:
    dashboard = json.loads((files / "dashboard.json").read_text())
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places) and len({panel["id"] for panel in dashboard["panels"]}) == len(places)
    names = {"${datasource}"}
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == names
