"""What `traceserve deploy` writes for clusters: linted, rendered and checked by strict schemas; there is no cluster here."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gzip
import hashlib
import http.client
import http.server
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

import jsonschema
import pytest
import yaml
from conftest import ROOT
from test_client import answering
from test_deploying import deployed
from traceserve import cli
from traceserve.deploying.described import Described, describe
from traceserve.deploying.plan import Text, Wishes
from traceserve.deploying.targets import TARGETS, kserve, kubernetes, sagemaker
from traceserve.errors import DeployError, ServerError
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
        found = chart.render(asked["values"], name=asked["name"], namespace="here", is_install=True)
    json.dump({"found": found}, sys.stdout)
except Exception as error:
    json.dump({"error": str(error)}, sys.stdout)
"""


def by_helm(what: str, chart: Path, values: Dict[str, Any], name: str = "demo") -> Any:
    """Helm's own `lint` or `render` of a chart, in a process of its own; raises ValueError with its words."""
    if importlib.util.find_spec("helm_python") is None:
        pytest.skip("helm-python-sdk is not installed")
    asked = json.dumps({"what": what, "chart": str(chart), "values": values, "name": name})
    result = subprocess.run([sys.executable, "-c", _HELM], input=asked, stdout=subprocess.PIPE, text=True, check=True)
    answer = json.loads(result.stdout)
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["found"]


def rendered(chart: Path, values: Optional[Mapping[str, Any]] = None, name: str = "demo") -> Documents:
    """The chart's documents; each of a core kind fits the schema of its kind, with no field that this does not know."""
    kubernetes = pytest.importorskip("kubernetes_validate")
    found: Documents = {}
    files = by_helm("render", chart, dict(values or {}), name)
    for file, text in files.items():
        for document in yaml.safe_load_all(text) if file.endswith(".yaml") else ():
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
    assert list(canaries) == ["/predictions/tiny"] and set(canaries["/predictions/tiny"]) == {"text", "parameters"}
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


@pytest.mark.parametrize(
    ("url", "ports"), [("https://h:8443/x", [80, 443, 8443]), ("http://h/x", [80, 443]), ("s3://b", [80, 443])]
)
def test_the_network_policy_lets_archives_be_fetched(mar: Path, url: str, ports: List[int], tmp_path: Path) -> None:
    chart = deployed("kubernetes", [mar], tmp_path / "out", "--url", url) / "chart"
    [egress] = rendered_egress(chart)
    assert [each["port"] for each in egress["ports"]] == [53, 53, *ports]


@pytest.mark.parametrize("source", ["image", "claim", "fetch"])
def test_another_archive_makes_other_pods(chart: Path, source: str) -> None:
    """Each compares its archive before it starts, wherever that comes from."""
    file = yaml.safe_load((chart / "values.yaml").read_text())["archives"]["files"][0]
    pods = []
    for digest in (file["sha256"], "0" * 64):
        archive = {**file, "sha256": digest, "url": "s3://bucket/tiny.mar"}
        spec = pod(rendered(chart, {"archives": {"source": source, "claim": "models", "files": [archive]}}))
        own = spec["containers"][0]
        assert own["command"][2:4] == ["traceserve.deploying.inside.pinned", f"/archives/tiny.mar={digest}"]
        assert own["command"][4:] == ["--", "python", "-m", "traceserve"] and own["args"][0] == "serve"
        pods.append(spec)
    assert pods[0] != pods[1]


def rendered_egress(chart: Path) -> List[Any]:
    found: List[Any] = rendered(chart)["NetworkPolicy", "demo"]["spec"]["egress"]
    return found


NAMES = ["true", "null", "1e5", "0x1F", "y", "123"]
VERSIONS = ["9083e12", "0o17", "y", "1_000", "1.0-", "_".join(["a" * 31] * 2) + "-", f"{'v' * 63}."]


def of_another_name(mar: Path, name: str, version: str) -> Described:
    [own] = describe([mar])
    return dataclasses.replace(own, name=name, manifest=dataclasses.replace(own.manifest, version=version))


def write_chart(archive: Described, folder: Path) -> Path:
    for file in kubernetes.chart_files([archive], Wishes("torchserve")):
        assert isinstance(file, Text)
        (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
        (folder / file.path).write_text(file.text)
    return folder


@pytest.mark.parametrize("number", range(7))
def test_every_legal_name_and_version_makes_a_legal_chart(mar: Path, number: int, tmp_path: Path) -> None:
    """Helm's YAML is Go's, which reads more words as numbers and truths than Python's."""
    name, version = NAMES[number % len(NAMES)], VERSIONS[number]
    chart = write_chart(of_another_name(mar, name, version), tmp_path)
    assert not by_helm("lint", chart, {})["errors"]
    documents = rendered(chart)
    metadata = documents["Deployment", "demo"]["metadata"]
    assert version.startswith(metadata["labels"]["app.kubernetes.io/version"])
    assert all(re.fullmatch(LABEL, value) for value in metadata["labels"].values())
    own = pod(documents)["containers"][0]
    assert own["args"][1] == f"/archives/{name}.mar" and own["image"].endswith(f":{version}")
    assert f"/predictions/{name}" in documents["ConfigMap", "demo"]["data"]["canaries.json"]


LABEL = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"


@pytest.mark.parametrize(("release", "name"), [("123", "m-123"), ("true", "true"), ("a.b", "a-b"), ("1e5", "m-1e5")])
def test_every_release_has_legal_names(chart: Path, release: str, name: str) -> None:
    documents = rendered(chart, name=release)
    assert documents["Service", name]["metadata"]["labels"]["app.kubernetes.io/instance"] == release
    for document in documents.values():
        assert document["metadata"]["name"] == name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", ["kserve", "kuberay"])
def test_a_name_in_a_custom_resource_is_a_text(mar: Path, target: str, name: str) -> None:
    archive = of_another_name(mar, name, "9083e12")
    files = TARGETS[target].plan([archive], Wishes(TARGETS[target].engines[0], url="s3://b")).files
    own = f"{kubernetes.plain_name(name)}.yaml" if target == "kserve" else "service.yaml"
    [text] = [file.text for file in files if isinstance(file, Text) and file.path == own]
    assert f'  name: "{kubernetes.plain_name(name)}"\n' in text
    assert not re.search(rf"^ +(- )?(name|version|archive): ({name}|9083e12)$", text, re.MULTILINE)


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
        assert {"name": "RAY_worker_niceness", "value": "0"} in container["env"]
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


@pytest.mark.parametrize("status", [200, 503])
def test_rays_probes_ask_the_pod_itself(mar: Path, status: int, tmp_path: Path) -> None:
    """A company's proxy, which a cluster may give to all its pods, knows nothing of a pod's localhost."""
    cluster = only(deployed("kuberay", [mar], tmp_path / "out", "--url", "gs://bucket") / "service.yaml")["spec"]
    groups = [cluster["rayClusterConfig"]["headGroupSpec"], *cluster["rayClusterConfig"]["workerGroupSpecs"]]
    dead = dict.fromkeys(("http_proxy", "HTTP_PROXY"), "http://127.0.0.1:9")
    environment = {**os.environ, **dead, "no_proxy": "", "NO_PROXY": ""}
    with answering(status, b"success") as url:
        for container in (group["template"]["spec"]["containers"][0] for group in groups):
            for probe in ("readinessProbe", "livenessProbe"):
                program, *arguments = container[probe]["exec"]["command"]
                assert program == "python" and "http://localhost:" in arguments[-1]
                asked = [re.sub(r"http://localhost:\d+", url, argument) for argument in arguments]
                found = subprocess.run([sys.executable, *asked], env=environment, capture_output=True, timeout=60)
                assert (found.returncode == 0) is (status == 200), found.stderr


# --- the proxy that compares keys: the chart's own nginx.conf, before a real TorchServe ---


def moved(text: str, places: Mapping[str, Any]) -> str:
    """Ports and folders of the pod as those of this test."""
    return re.sub("|".join(map(re.escape, places)), lambda found: str(places[found[0]]), text)


KEY = "Key_of-24-letters-at-least"


def nginx_program() -> str:
    nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if nginx is None:
        pytest.skip("nginx is not installed")
    return nginx


@contextlib.contextmanager
def proxied(chart: Path, folder: Path, mar: Path) -> Iterator[Tuple[int, int]]:
    nginx_program()
    inner, metrics = configuration.free_ports(2)
    instance = server.start([mar], port=inner, timeout=180, front=FrontendOptions(metrics_port=metrics))
    try:
        with proxy(chart, folder, inner, metrics) as (public, shown, _):
            yield public, shown
    finally:
        instances.stop(instance, at_once=True)


@contextlib.contextmanager
def proxy(chart: Path, folder: Path, inner: int, metrics: int) -> Iterator[Tuple[int, int, subprocess.Popen[bytes]]]:
    """The pod's nginx before a server that listens on these ports; it says all that it says on standard error."""
    nginx = nginx_program()
    public, shown = configuration.free_ports(2)
    documents = rendered(chart)
    here = {"8080": public, "8081": inner, "8082": shown, "8083": metrics, "/tmp": folder, "/etc/traceserve": folder}
    (folder / "nginx.conf").write_text(moved(documents["ConfigMap", "demo"]["data"]["nginx.conf"], here))
    container = pod(documents)["containers"][1]
    script = moved(container["args"][0], here)
    if os.geteuid() == 0:  # nginx would serve as nobody, who may not enter the test's folder
        script = script.replace("daemon off;", "daemon off; user root;")
    environment = {"PATH": f"{Path(nginx).parent}:{os.environ['PATH']}", "TRACESERVE_KEY": KEY}
    running = subprocess.Popen([*container["command"], script], env=environment, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 20
        while ask(public, "GET", "/ping")[0] != 200:
            assert running.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        yield public, shown, running
    finally:
        running.terminate()
        running.communicate(timeout=20)


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


class Recorder(http.server.BaseHTTPRequestHandler):
    """In the place of TorchServe: it says what it was asked, and breaks off where it is told to."""

    protocol_version = "HTTP/1.1"
    asked: List[Tuple[str, str, int]] = []

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.asked.append((self.command, self.path, len(body)))
        if "break" in self.path:
            self.close_connection = True
            return
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_POST = do_GET

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture()
def recorder() -> Iterator[int]:
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Recorder)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    Recorder.asked = []
    yield found.server_port
    found.shutdown()
    found.server_close()


def test_without_the_key_nothing_but_the_check_passes_the_proxy(chart: Path, recorder: int, tmp_path: Path) -> None:
    with proxy(chart, tmp_path, recorder, recorder) as (port, shown, _):
        Recorder.asked.clear()
        for at, path in ((port, "/ping"), (shown, "/metrics")):
            assert ask(at, "POST", path, bytes(1 << 21))[0] in (0, 403, 413)  # 0: it closed while the body came
            assert ask(at, "GET", path, bytes(1 << 21))[0] in (0, 413)
            assert ask(at, "DELETE", path)[0] == 403
            for around in (
                f"/predictions/tiny/1.0/info/../../../..{path}",
                f"/x/..{path}",
                f"//.{path}",
                f"/%2e/{path[1:]}",
            ):
                status, _ = ask(at, "GET", around, b"a text")
                assert status == 200, around
        assert set(Recorder.asked) == {("GET", "/ping", 0), ("GET", "/metrics", 0)}
        assert ask(port, "POST", "/predictions/tiny", bytes(1 << 21))[0] in (0, 401)
        assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 100_000]


def test_the_proxy_keeps_no_text(chart: Path, recorder: int, tmp_path: Path) -> None:
    """A large body lies in memory, and no message has a request's address."""
    with proxy(chart, tmp_path, recorder, recorder) as (port, _, running):
        for path, expected in (("/predictions/tiny", 200), ("/predictions/break", 502)):
            body = b'{"text": "' + b"zanzibar " * 10_000 + b'"}'
            assert ask(port, "POST", f"{path}?text=zanzibar", body, f"Bearer {KEY}")[0] == expected
        assert ask(port, "POST", "/predictions/tiny?text=zanzibar", bytes(65 << 20), f"Bearer {KEY}")[0] in (0, 413)
        running.terminate()
        _, said = running.communicate(timeout=20)
    assert b"zanzibar" not in said and b"predictions" not in said
    assert b" answered 502, upstream 502, after " in said
    documents = rendered(chart)
    [volume] = [each for each in pod(documents)["volumes"] if each["name"] == "proxy-tmp"]
    own = pod(documents)["containers"][1]
    assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "512Mi"}
    assert own["resources"]["limits"]["memory"] == "640Mi"  # and what nginx itself takes
    assert {"name": "proxy-tmp", "mountPath": "/tmp"} in own["volumeMounts"]


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


@pytest.mark.parametrize(
    ("hardware", "device", "taints"),
    [
        ("gpu", "nvidia.com/gpu", ["nvidia.com/gpu"]),
        ("neuron", "aws.amazon.com/neuroncore", ["aws.amazon.com/neuron", "aws.amazon.com/neuroncore"]),
    ],
)
def test_an_archive_for_a_device_asks_for_it(
    mar: Path, hardware: str, device: str, taints: List[str], tmp_path: Path
) -> None:
    """What its manifest says is enough: no device is here."""
    [own] = describe([mar])
    changed = dataclasses.replace(own, manifest=dataclasses.replace(own.manifest, hardware=hardware))
    documents = rendered(write_chart(changed, tmp_path))
    wanted = pod(documents)["containers"][0]["resources"]
    assert wanted["requests"][device] == wanted["limits"][device] == "1"
    assert pod(documents)["tolerations"] == [{"key": taint, "operator": "Exists"} for taint in taints]
    assert "HorizontalPodAutoscaler" not in {kind for kind, _ in documents}  # cores say little of it
    assert documents["Deployment", "demo"]["spec"]["replicas"] == 2


@pytest.mark.parametrize("target", ["kserve", "kuberay"])
def test_a_custom_resource_goes_to_the_nodes_with_the_device(mar: Path, target: str) -> None:
    [own] = describe([mar])
    changed = dataclasses.replace(own, manifest=dataclasses.replace(own.manifest, hardware="neuron"))
    files = TARGETS[target].plan([changed], Wishes(TARGETS[target].engines[0], url="s3://b")).files
    name = "tiny.yaml" if target == "kserve" else "service.yaml"
    [text] = [file.text for file in files if isinstance(file, Text) and file.path == name]
    document = yaml.safe_load(text)
    spec = document["spec"]
    if target == "kserve":
        found = spec["predictor"]["tolerations"]
    else:
        found = spec["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]["tolerations"]
    assert [each["key"] for each in found] == ["aws.amazon.com/neuron", "aws.amazon.com/neuroncore"]
    assert 'aws.amazon.com/neuroncore: "1"\n' in text
    assert not problems(document)


@pytest.mark.parametrize("target", ["docker", "kubernetes"])
def test_what_a_container_would_refuse_is_refused(mar: Path, target: str) -> None:
    [own] = describe([mar])
    changed = dataclasses.replace(own, manifest=dataclasses.replace(own.manifest, hardware="neuron"))
    with pytest.raises(DeployError, match="is for neuron, which `traceserve serve --engine ray` refuses"):
        TARGETS[target].plan([changed], Wishes("ray"))
    assert TARGETS[target].plan([changed], Wishes("torchserve"))


@pytest.mark.parametrize("count", [1, 2])
def test_ray_gives_each_replica_a_neuron_core(mar: Path, count: int) -> None:
    """A worker of the cluster has as many as its pod, in the form that KubeRay, the shell and Ray's autoscaler read."""
    [own] = describe([mar])
    changed = dataclasses.replace(own, manifest=dataclasses.replace(own.manifest, hardware="neuronx"))
    archives = [changed, dataclasses.replace(changed, name="other")][:count]
    files = TARGETS["kuberay"].plan(archives, Wishes("ray", url="s3://b")).files
    [text] = [file.text for file in files if isinstance(file, Text) and file.path == "service.yaml"]
    document = yaml.safe_load(text)
    assert not problems(document)
    [group] = document["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert group["rayStartParams"] == {"resources": f"'{{\"neuron_cores\": {count}}}'"}
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["aws.amazon.com/neuroncore"] == str(count)
    applications = yaml.safe_load(document["spec"]["serveConfigV2"])["applications"][:count]
    assert [each["args"]["replicas"]["neuron_cores"] for each in applications] == [1] * count


@pytest.mark.parametrize(
    ("hardware", "instance"), [("cpu", "c7i"), ("gpu", "g5"), ("neuron", "inf1"), ("neuronx", "inf2")]
)
def test_amazons_instances_have_the_chip(mar: Path, hardware: str, instance: str) -> None:
    [own] = describe([mar])
    changed = dataclasses.replace(own, manifest=dataclasses.replace(own.manifest, hardware=hardware))
    assert f"InstanceType=ml.{instance}." in " ".join(sagemaker.plan([changed], Wishes("uvicorn")).commands)
