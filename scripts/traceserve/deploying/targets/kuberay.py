"""`kuberay`: a RayService whose Serve configuration is that of `traceserve_hosts.ray_config`."""

from __future__ import annotations

import json
from typing import Any, Dict, List, Sequence

from traceserve_hosts import KEY_VARIABLE
from traceserve_hosts.ray_config import NEURON_CORES, NICENESS, Hosted, Replicas, applications

from traceserve.deploying import packages, resources, templates
from traceserve.deploying.described import Described
from traceserve.deploying.plan import DeployTarget, Plan, Text, Wishes, prefixed
from traceserve.deploying.targets import docker
from traceserve.deploying.targets.kubernetes import plain_name

_RAYLET = "http://localhost:52365/api/local_raylet_healthz"
_PROXY = "http://localhost:8000/-/healthz"


def serve_config(archives: Sequence[Described], wishes: Wishes) -> Dict[str, object]:
    """The Serve configuration: archives in the image, or fetched by each node and compared with their SHA-256."""
    hosted = [
        Hosted(
            address=f"{wishes.url.rstrip('/')}/{each.file.name}" if wishes.url else f"/archives/{each.name}.mar",
            name=each.name,
            version=each.version,
            sha256=each.sha256,
            replicas=Replicas(
                1,
                6,
                float(each.serving.threads or 1),
                float(each.manifest.on_gpu),
                neuron_cores=int(resources.KUBERNETES_RESOURCES.get(each.manifest.hardware) == resources.NEURON_CORE),
            ),
        )
        for each in archives
    ]
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": 8000},
        "applications": applications(hosted),
    }


def plan(archives: Sequence[Described], wishes: Wishes) -> Plan:
    """The RayService beside its image's folder."""
    name, image = plain_name(archives[0].name), docker.image_name(archives, wishes)
    needed = resources.needed(archives, wishes.engine)
    secret = f"{name}-keys"
    text = templates.fill(
        "kuberay/service.yaml",
        name=name,
        serve=templates.block(serve_config(archives, wishes), 4),
        ray=templates.flow(packages.ray_version()),
        image=templates.flow(image),
        security=templates.block(_SECURITY, 10),
        worker_security=templates.block(_SECURITY, 12),
        worker_start=templates.flow(_start_options(needed)),
        tolerations=templates.flow(needed.tolerations()),
        head=templates.block(_container(_HEAD, [_RAYLET], secret), 14),
        worker=templates.block(
            _container({"requests": needed.requests(), "limits": needed.limits()}, [_RAYLET, _PROXY], secret), 16
        ),
        volumes=templates.block(_VOLUMES, 10),
        worker_volumes=templates.block(_VOLUMES, 12),
        reasons="\n".join(f"                # {reason}" for reason in needed.reasons),
    )
    commands: List[str] = [docker.build_and_push(image)]
    if wishes.url:
        commands += [f"# put {each.file} at {wishes.url.rstrip('/')}/{each.file.name}" for each in archives]
    commands += [
        f"kubectl create secret generic {secret} --from-literal=key=$(openssl rand -hex 24)",
        "kubectl apply --filename service.yaml",
        f"kubectl port-forward service/{name}-serve-svc 8000",
    ]
    files = docker.image_files(archives, wishes, with_archives=not wishes.url, installed=_PACKAGES)
    return Plan(
        (Text("service.yaml", text), *prefixed("image", files)),
        tuple(commands),
        (
            f"the replicas demand the key of the Secret {secret}; Ray's own dashboard and its ports demand none: let a network "
            "policy keep others from the head.",
        ),
    )


def _start_options(needed: resources.Resources) -> Dict[str, str]:
    """Of `ray start` on workers: an image has no neuron-ls, by which Ray counts cores. Ray's autoscaler and KubeRay take off the
    quotes that the shell needs."""
    cores = needed.devices.get(resources.NEURON_CORE)
    return {"resources": f"'{json.dumps({NEURON_CORES: cores})}'"} if cores else {}


# KubeRay speaks to Ray's dashboard and its agents, which `serve` alone does not bring.
_PACKAGES = ("ray[default,serve]", "multipart")
_HEAD = {"requests": {"cpu": "1", "memory": "2Gi"}, "limits": {"memory": "4Gi"}}
_SECURITY: Dict[str, object] = {
    "securityContext": {
        "runAsNonRoot": True,
        "runAsUser": 10001,
        "runAsGroup": 10001,
        "fsGroup": 10001,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
}
_VOLUMES: Dict[str, object] = {
    "volumes": [{"name": "tmp", "emptyDir": {}}, {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}]
}


def _container(needed: Dict[str, Any], urls: Sequence[str], secret: str) -> Dict[str, Any]:
    """What head and workers have alike. KubeRay's own probes run wget, which a slim image lacks."""
    direct = "import urllib.request as r; direct = r.build_opener(r.ProxyHandler({})); "  # whatever HTTP_PROXY says
    code = direct + "[direct.open(url, timeout=5) for url in " + repr(list(urls)) + "]"
    alive = code if len(urls) == 1 else code.replace(repr(list(urls)), repr(list(urls[:1])))
    return {
        "env": [
            {
                "name": KEY_VARIABLE,
                "valueFrom": {"secretKeyRef": {"name": secret, "key": "key"}},
            },
            {"name": NICENESS, "value": "0"},
        ],
        "resources": needed,
        "readinessProbe": {
            "exec": {"command": ["python", "-c", code]},
            "timeoutSeconds": 10,
            "periodSeconds": 10,
            "failureThreshold": 6,
        },
        "livenessProbe": {
            "exec": {"command": ["python", "-c", alive]},
            "timeoutSeconds": 10,
            "initialDelaySeconds": 30,
            "periodSeconds": 10,
            "failureThreshold": 12,
        },
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}, {"name": "shm", "mountPath": "/dev/shm"}],
    }


TARGET = DeployTarget(("ray",), plan)
