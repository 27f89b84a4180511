"""What `traceserve deploy` writes for clusters: linted, rendered and checked by strict schemas; there is no cluster here."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gzip
import hashlib
import http.client
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

import jsonschema
import pytest
import yaml
from conftest import ROOT
from test_deploying import deployed
from traceserve import cli
from traceserve.deploying.described import describe
from traceserve.deploying.plan import Text, Wishes
from traceserve.deploying.targets import kserve, kubernetes, sagemaker
from traceserve.errors import ServerError
from traceserve.serving import configuration, instances, keys, server
from traceserve.serving.front import FrontendOptions

VERSION = "1.31"  # of Kubernetes, whose schemas are strict
Documents = Dict[Tuple[str, str], Dict[str, Any]]  # by kind and name


# Helm is a Go library with a runtime of its own, which is not loaded into a process that holds torch and OpenVINO: there it
# once ended the process without a word.
_HELM = """
import json, sys
from helm_python import chart as helm
asked = json.load(sys.stdin)
try:
    if asked["what"] == "lint":
        found = helm.lint(asked["chart"], asked["values"], strict=True)
    else:
        chart = helm.Chart.load(asked["chart"])
        found = chart.render(asked["values"], name="demo", namespace="here", is_install=True)
    json.dump({"found": found}, sys.stdout)
except Exception as error:
    json.dump({"error": str(error)}, sys.stdout)
"""


def by_helm(what: str, chart: Path, values: Dict[str, Any]) -> Any:
    """Helm's own `lint` or `render` of a chart, in a process of its own; raises ValueError with its words."""
    if importlib.util.find_spec("helm_python") is None:
        pytest.skip("helm-python-sdk is not installed")
    asked = json.dumps({"what": what, "chart": str(chart), "values": values})
    result = subprocess.run([sys.executable, "-c", _HELM], input=asked, stdout=subprocess.PIPE, text=True, check=True)
    answer = json.loads(result.stdout)
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["found"]


def rendered(chart: Path, values: Optional[Mapping[str, Any]] = None) -> Documents:
    """The chart's documents; each of a core kind fits the schema of its kind, with no field that this does not know."""
    kubernetes = pytest.importorskip("kubernetes_validate")
    found: Documents = {}
    files = by_helm("render", chart, dict(values or {}))
    for name, text in files.items():
        for document in yaml.safe_load_all(text) if name.endswith(".yaml") else ():
            if document is None:
                continue
            if document["apiVersion"] != "monitoring.coreos.com/v1":  # of Prometheus' operator
                kubernetes.validate(document, VERSION, strict=True)
            found[document["kind"], document["metadata"]["name"]] = document
    return found


@pytest.fixture(scope="module")
def chart(mar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deployed("kubernetes", [mar], tmp_path_factory.mktemp("kubernetes") / "out") / "chart"


def pod(documents: Documents) -> Dict[str, Any]:
    spec: Dict[str, Any] = documents["Deployment", "demo"]["spec"]["template"]["spec"]
    return spec


VALUES: Dict[str, Dict[str, Any]] = {
    "as written": {},
    "ray": {"engine": "ray"},
    "without keys": {"keys": {"enabled": False}},
    "a claim": {"archives": {"source": "claim", "claim": "models"}},
    "fixed": {"autoscaling": {"enabled": False}, "networkPolicy": {"enabled": False}},
    "all else": {
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "podAnnotations": {"a": "b"},
        "imagePullSecrets": [{"name": "registry"}],
        "nodeSelector": {"disk": "fast"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}
        ],
    },
}


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_the_chart_is_clean_and_fits_the_schemas(chart: Path, values: Dict[str, Any]) -> None:
    report = by_helm("lint", chart, values)
    assert not report["errors"]
    assert [message["error"] for message in report["messages"]] == ["icon is recommended"]
    documents = rendered(chart, values)
    kinds = {kind for kind, _ in documents}
    assert {"Deployment", "Service", "ServiceAccount", "ConfigMap", "PodDisruptionBudget"} <= kinds
    assert ("HorizontalPodAutoscaler" in kinds) == ("NetworkPolicy" in kinds) == (values is not VALUES["fixed"])
    assert ("ServiceMonitor" in kinds) == (values is VALUES["all else"])
    for container in pod(documents)["containers"]:
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert any(mount["mountPath"] == "/tmp" for mount in container["volumeMounts"])
        assert container["resources"]["limits"]["memory"]
    assert pod(documents)["securityContext"]["runAsNonRoot"] is True


def test_the_schema_check_can_fail(chart: Path, tmp_path: Path) -> None:
    shutil.copytree(chart, tmp_path / "chart")
    file = tmp_path / "chart/templates/service.yaml"
    file.write_text(file.read_text() + "  sessionAfinity: ClientIP\n")
    with pytest.raises(Exception, match="sessionAfinity"):
        rendered(tmp_path / "chart")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"engine": "triton"}, "engine"),
        ({"replica": 3}, "replica"),
        ({"keys": {"existingSecret": ""}}, "keys.existingSecret"),
        ({"archives": {"source": "claim"}}, "archives.claim"),
        ({"archives": {"source": "fetch"}}, "archives.files\\[0\\].url"),
        ({"engine": "ray", "serviceMonitor": {"enabled": True}}, "serviceMonitor.enabled"),
    ],
)
def test_values_that_cannot_work_are_refused(chart: Path, values: Dict[str, Any], told: str) -> None:
    with pytest.raises(Exception, match=told):
        rendered(chart, values)


def test_the_pod_serves_what_the_archive_says(chart: Path) -> None:
    spec = pod(rendered(chart))
    own, proxy = spec["containers"]
    assert own["args"][:2] == ["serve", "/archives/tiny.mar"] and "--host=127.0.0.1" in own["args"]
    assert "ports" not in own and proxy["ports"][0]["containerPort"] == 8080
    assert own["resources"]["requests"]["cpu"] == "2" and "cpu" not in own["resources"]["limits"]
    canaries = json.loads(rendered(chart)["ConfigMap", "demo"]["data"]["canaries.json"])
    assert list(canaries) == ["/predictions/tiny"] and set(canaries["/predictions/tiny"]) == {"text"}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert own[probe]["exec"]["command"][2] == "traceserve.deploying.inside.canary"
        assert own[probe]["timeoutSeconds"] > 20  # the canary's own time limit comes first
    [open_pod] = pod(rendered(chart, VALUES["without keys"]))["containers"]
    assert {"--host=0.0.0.0", "--without-keys", "--metrics-port=8082"} <= set(open_pod["args"])
    [ray] = pod(rendered(chart, VALUES["ray"]))["containers"]
    assert ray["env"][0]["valueFrom"]["secretKeyRef"] == {"name": "tiny-keys", "key": "key"}
    assert ray["livenessProbe"]["httpGet"] == {"path": "/live", "port": "http"}  # a long queue is no reason to restart
    assert "exec" not in ray["livenessProbe"] and "exec" in ray["readinessProbe"]


def test_archives_are_fetched_before_the_server_starts(mar: Path, tmp_path: Path) -> None:
    folder = deployed(
        "kubernetes", [mar], tmp_path / "out", "--url", "s3://bucket/models/", "--image", "r.example.org/t:2"
    )
    documents = rendered(folder / "chart", {"archives": {"credentialsSecret": "s3"}})
    [fetch] = pod(documents)["initContainers"]
    assert fetch["args"][0] == "s3://bucket/models/tiny.mar" and len(fetch["args"][3]) == 64
    assert fetch["image"] == "r.example.org/t:2" and fetch["envFrom"] == [{"secretRef": {"name": "s3"}}]
    assert documents["NetworkPolicy", "demo"]["spec"]["egress"]
    assert not (folder / "image/archives").exists() and "COPY archives" not in (folder / "image/Dockerfile").read_text()
    assert not rendered_egress(deployed("kubernetes", [mar], tmp_path / "other") / "chart")


def rendered_egress(chart: Path) -> List[Any]:
    found: List[Any] = rendered(chart)["NetworkPolicy", "demo"]["spec"]["egress"]
    return found


# --- custom resources ---

SCHEMAS = ROOT.parent / "shared" / "schemas"


def schema(name: str) -> Dict[str, Any]:
    """A structural schema as the API server reads it: it knows the fields that it names, and refuses others."""
    file = SCHEMAS / f"{name}.json.gz"
    if not file.is_file():
        pytest.skip(f"{file.name} is not here")
    content: Dict[str, Any] = json.loads(gzip.decompress(file.read_bytes()))
    return closed(content)


def closed(node: Any) -> Any:
    if isinstance(node, list):
        return [closed(each) for each in node]
    if not isinstance(node, dict):
        return node
    inner = {key: closed(value) for key, value in node.items()}
    named = isinstance(node.get("properties"), dict) and node.get("type") == "object"
    if named and not node.get("x-kubernetes-preserve-unknown-fields"):
        inner.setdefault("additionalProperties", False)
    return inner


def problems(document: Dict[str, Any]) -> List[str]:
    group, version = document["apiVersion"].split("/")
    validator = jsonschema.Draft202012Validator(schema(f"{group}_{version}_{document['kind']}"))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


def only(file: Path) -> Dict[str, Any]:
    [document] = [each for each in yaml.safe_load_all(file.read_text()) if each]
    found: Dict[str, Any] = document
    return found


def test_the_kserve_files_fit(mar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = deployed("kserve", [mar], tmp_path / "out", "--url", "s3://bucket/models")
    runtime, service = only(folder / "serving_runtime.yaml"), only(folder / "tiny.yaml")
    assert not problems(runtime) and not problems(service)
    model = service["spec"]["predictor"]["model"]
    assert model["storageUri"] == "s3://bucket/models/tiny.mar"
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["modelFormat"]["name"] == runtime["spec"]["supportedModelFormats"][0]["name"]
    assert model["env"] == [{"name": "TRACESERVE_SHA256", "value": hashlib.sha256(mar.read_bytes()).hexdigest()}]
    [container] = runtime["spec"]["containers"]
    paths = {
        probe: container[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")
    }
    assert paths == {"startupProbe": "/health", "readinessProbe": "/health", "livenessProbe": "/live"}
    misspelt = copy.deepcopy(service)
    misspelt["spec"]["predictor"]["model"]["storageURI"] = model["storageUri"]
    assert "storageURI" in " ".join(problems(misspelt))
    assert cli.main(["deploy", "kserve", str(mar), "--output", str(tmp_path / "none")]) == 1
    assert "--url" in capsys.readouterr().err


def test_inference_services_have_names_of_their_own(
    mar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The image has the packages of all, whose archives come later."""
    one, other = (Path(shutil.copy(mar, tmp_path / f"{name}.mar")) for name in ("3D_bert", "runtime"))
    own = describe([one, other])
    onnx = dataclasses.replace(own[1], manifest=dataclasses.replace(own[1].manifest, save_mode="onnx"))
    files = kserve.plan([own[0], onnx], Wishes("uvicorn", url="s3://bucket")).files
    assert {"serving_runtime.yaml", "m-3d-bert.yaml", "runtime.yaml"} <= {file.path for file in files}
    [needed] = [file.text for file in files if isinstance(file, Text) and file.path == "image/requirements.txt"]
    assert "onnxruntime" in needed
    clash = str(shutil.copy(mar, tmp_path / "3d-bert.mar"))
    arguments = ["deploy", "kserve", str(one), clash, "--url", "s3://bucket", "--output", str(tmp_path / "out")]
    assert cli.main(arguments) == 1
    assert "both be the InferenceService m-3d-bert" in " ".join(capsys.readouterr().err.split())


def test_a_name_is_as_short_as_kuberay_needs_it() -> None:
    assert kubernetes.plain_name("bert-large-uncased-whole-word-masking-finetuned-squad") == (
        "bert-large-uncased-whole-word-masking-finetuned"
    )
    assert kubernetes.plain_name("123") == "m-123" and kubernetes.plain_name("A_b.") == "a-b"


@pytest.mark.parametrize("count", [1, 2])
def test_the_ray_service_fits(mar: Path, count: int, tmp_path: Path) -> None:
    shutil.copyfile(mar, tmp_path / "other.mar")
    folder = deployed("kuberay", [mar, tmp_path / "other.mar"][:count], tmp_path / "out", "--url", "gs://bucket")
    service = only(folder / "service.yaml")
    assert not problems(service)
    serve = yaml.safe_load(service["spec"]["serveConfigV2"])
    first = serve["applications"][0]
    assert first["import_path"] == "traceserve_hosts.ray_serve:archive"
    assert first["args"]["archive"] == "gs://bucket/tiny.mar" and len(first["args"]["sha256"]) == 64
    assert len(serve["applications"]) == (1 if count == 1 else 3)  # and the router
    for misspelt in ("rayClusterConfig", "serveConfigV2"):
        wrong = {**service, "spec": {**service["spec"], f"{misspelt}s": service["spec"][misspelt]}}
        assert misspelt in " ".join(problems(wrong))
    needed = (folder / "image/requirements.txt").read_text()  # KubeRay asks Ray's dashboard
    assert "ray[default,serve]==" in needed or "opencensus" in needed
    cluster = service["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for container in (group["template"]["spec"]["containers"][0] for group in groups):
        assert container["image"] == "tiny:1.0" and container["securityContext"]["readOnlyRootFilesystem"]
        assert container["env"][0]["valueFrom"]["secretKeyRef"]["name"] == "tiny-keys"
    pytest.importorskip("kubernetes_validate").validate(  # the pods are ordinary ones
        {
            "apiVersion": "v1",
            "kind": "PodTemplate",
            "metadata": {"name": "x"},
            "template": cluster["workerGroupSpecs"][0]["template"],
        },
        VERSION,
        strict=True,
    )


# --- the proxy that compares keys: the chart's own nginx.conf, before a real TorchServe ---


def moved(text: str, places: Mapping[str, Any]) -> str:
    """Ports and folders of the pod as those of this test."""
    return re.sub("|".join(map(re.escape, places)), lambda found: str(places[found[0]]), text)


KEY = "Key_of-24-letters-at-least"


@contextlib.contextmanager
def proxied(chart: Path, folder: Path, mar: Path) -> Iterator[Tuple[int, int]]:
    nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if nginx is None:
        pytest.skip("nginx is not installed")
    public, shown, inner, metrics = configuration.free_ports(4)
    instance = server.start([mar], port=inner, timeout=180, front=FrontendOptions(metrics_port=metrics))
    documents = rendered(chart)
    here = {"8080": public, "8081": inner, "8082": shown, "8083": metrics, "/tmp": folder, "/etc/traceserve": folder}
    (folder / "nginx.conf").write_text(moved(documents["ConfigMap", "demo"]["data"]["nginx.conf"], here))
    proxy = pod(documents)["containers"][1]
    script = moved(proxy["args"][0], here)
    environment = {"PATH": f"{Path(nginx).parent}:{os.environ['PATH']}", "TRACESERVE_KEY": KEY}
    running = subprocess.Popen([*proxy["command"], script], env=environment, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 20
        while ask(public, "GET", "/ping")[0] != 200:
            assert running.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        yield public, shown
    finally:
        running.terminate()
        running.communicate(timeout=20)
        instances.stop(instance, at_once=True)


def ask(port: int, method: str, path: str, body: Optional[bytes] = None, key: str = "") -> Tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Content-Type": "application/json", **({"Authorization": key} if key else {})}
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read()
    except OSError:
        return 0, b""
    finally:
        connection.close()


def test_the_proxy_lets_in_who_has_the_key(chart: Path, mar: Path, tmp_path: Path) -> None:
    with proxied(chart, tmp_path, mar) as (port, metrics):
        body = b'{"text": "Yes."}'
        status, answer = ask(port, "POST", "/predictions/tiny", body, f"Bearer {KEY}")
        assert status == 200 and "label" in json.loads(answer)
        for wrong in ("", "Bearer", f"Bearer {KEY.lower()}", f"Bearer {KEY}x", f"Bearer x{KEY}", KEY, f"bearer {KEY}"):
            status, answer = ask(port, "POST", "/predictions/tiny", body, wrong)
            assert status == 401 and json.loads(answer)["error"]["type"] == "Unauthorized", wrong
        assert ask(port, "POST", "/v1/models/tiny:predict", b'{"instances": ["Yes."]}', f"Bearer {KEY}")[0] == 200
        status, page = ask(metrics, "GET", "/metrics")
        assert status == 200 and re.search(rb"^ts_inference_requests_total\{", page, re.MULTILINE)
        assert ask(metrics, "GET", "/predictions/tiny")[0] == 404
    assert (tmp_path / "keys.map").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("key", ["", 'x" 1; default 1;', "a b", "a.b"])
def test_the_proxy_refuses_a_key_that_is_more_than_a_key(chart: Path, key: str, tmp_path: Path) -> None:
    script = pod(rendered(chart))["containers"][1]["args"][0].replace("/tmp/", f"{tmp_path}/")
    result = subprocess.run(["/bin/sh", "-c", script], env={"TRACESERVE_KEY": key}, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1 and "letters, digits" in result.stderr and not list(tmp_path.iterdir())


def test_ray_takes_the_key_that_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """All pods of a deployment have one; without it each start has another."""
    monkeypatch.setenv("TRACESERVE_KEY", KEY)
    assert keys.user_key() == KEY
    monkeypatch.setenv("TRACESERVE_KEY", f"{KEY}\n")  # of a file
    assert keys.user_key() == KEY
    monkeypatch.setenv("TRACESERVE_KEY", "\n")
    with pytest.raises(ServerError, match="TRACESERVE_KEY is blank"):
        keys.user_key()
    monkeypatch.delenv("TRACESERVE_KEY")
    assert len(keys.user_key()) > 24 and keys.user_key() != keys.user_key()


@pytest.mark.parametrize(("hardware", "device"), [("gpu", "nvidia.com/gpu"), ("neuron", "aws.amazon.com/neuron")])
def test_an_archive_for_a_device_asks_for_it(mar: Path, hardware: str, device: str, tmp_path: Path) -> None:
    """What its manifest says is enough: no device is here."""
    [own] = describe([mar])
    changed = dataclasses.replace(own, manifest=dataclasses.replace(own.manifest, hardware=hardware))
    for file in kubernetes.chart_files([changed], Wishes("torchserve")):
        assert isinstance(file, Text)
        (tmp_path / file.path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file.path).write_text(file.text)
    documents = rendered(tmp_path)
    wanted = pod(documents)["containers"][0]["resources"]
    assert wanted["requests"][device] == wanted["limits"][device] == "1"
    assert pod(documents)["tolerations"] == [{"key": device, "operator": "Exists"}]
    assert "HorizontalPodAutoscaler" not in {kind for kind, _ in documents}  # cores say little of it
    assert documents["Deployment", "demo"]["spec"]["replicas"] == 2


@pytest.mark.parametrize(
    ("hardware", "instance"), [("cpu", "c7i"), ("gpu", "g5"), ("neuron", "inf1"), ("neuronx", "inf2")]
)
def test_amazons_instances_have_the_chip(mar: Path, hardware: str, instance: str) -> None:
    [own] = describe([mar])
    changed = dataclasses.replace(own, manifest=dataclasses.replace(own.manifest, hardware=hardware))
    assert f"InstanceType=ml.{instance}." in " ".join(sagemaker.plan([changed], Wishes("uvicorn")).commands)
