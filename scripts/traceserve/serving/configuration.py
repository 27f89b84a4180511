"""TorchServe's files: a hardened configuration, one quiet log, our metrics."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
from pathlib import Path
from typing import Dict, List, Mapping, Tuple

from traceserve_hosts.addresses import is_only_local
from traceserve_runtime.manifest import Manifest

from traceserve.archives.contents import configure_unpacked, unpack
from traceserve.archives.model_config import SERVING_FILE, Serving
from traceserve.errors import ServerError
from traceserve.serving import java, management
from traceserve.serving.front import FrontendOptions

DEFAULT_WORKERS = 1  # for an archive that sets none; TorchServe's default is one per core
MIRROR_FILE = "mirror.json"  # in a server's folder, while its answered requests are shown; see `mirror`
# A server's keys stay valid while it runs: TorchServe's default of one hour would lock everybody out at night.
_KEY_MINUTES = 10 * 365 * 24 * 60


def configure_server(
    folder: Path,
    files: Mapping[str, Path],
    servings: Mapping[str, Serving],
    host: str,
    port: int,
    front: FrontendOptions = FrontendOptions(),
    private: bool = False,
) -> Tuple[Tuple[int, int], Dict[str, Path]]:
    """Write all of TorchServe's files; returns its management and metrics ports, and the files by option.

    `private`: this user alone reaches the management API, see `management`, so that it may register and remove models;
    its port is 0.

    `servings` override archives' own serving configurations. Their model-config.yaml files are changed,
    since these win over config.properties.
    """
    port_of_it, free, grpc_inference, grpc_management = free_ports(4)
    metrics = front.metrics_port or free
    store = prepare_folder(folder, files, servings)
    shown_host = f"[{host}]" if ":" in host else host
    properties = {
        "inference_address": f"{front.scheme}://{shown_host}:{port}",
        "management_address": f"unix:{folder / management.SOCKET}" if private else f"http://127.0.0.1:{port_of_it}",
        "metrics_address": f"http://{shown_host if front.metrics_port else '127.0.0.1'}:{metrics}",
        "grpc_inference_address": "127.0.0.1",
        "grpc_management_address": management.NOBODY if private else "127.0.0.1",
        "grpc_inference_port": grpc_inference,
        "grpc_management_port": grpc_management,
        "model_store": store,
        "load_models": ",".join(f"{name}={name}" for name in files),
        "default_workers_per_model": DEFAULT_WORKERS,
        "allowed_urls": re.escape(f"file://{store}/") + ".*",
        "enable_model_api": str(private).lower(),
        "disable_token_authorization": str(not demands_keys(host, front)).lower(),
        "token_expiration_min": _KEY_MINUTES,
        "install_py_dep_per_model": "false",
        **front.properties(Manifest.read(store / name, verify=False) for name in files),
        "metrics_mode": "prometheus",
        "metrics_config": folder / "metrics.yaml",
        "disable_system_metrics": "true",
        "enable_envvars_config": "false",
        "vmargs": " ".join(java.jvm_options(folder)),
    }
    config = folder / "config.properties"
    config.write_text("".join(_property(key, value) for key, value in properties.items()), encoding="ascii")
    (folder / java.LOG_CONFIG).write_text(_JAVA_LOGGING.replace("FOLDER", str(folder / "logs")), encoding="utf-8")
    log_config = folder / "log4j2.xml"
    log_config.write_text(_LOG_CONFIG.replace("FOLDER", str(folder / "logs")), encoding="utf-8")
    (folder / "metrics.yaml").write_text(METRICS, encoding="utf-8")
    return (0 if private else port_of_it, metrics), {
        "ts-config": config,
        "log-config": log_config,
        "model-store": store,
    }


def _property(key: str, value: object) -> str:
    """Return a line as Java reads it: in Latin-1, with any other character as UTF-16 in escapes."""
    units = str(value).replace("\\", "\\\\").encode("utf-16-be")
    numbers = [units[i] << 8 | units[i + 1] for i in range(0, len(units), 2)]
    return f"{key}=" + "".join(chr(n) if n < 128 else f"\\u{n:04x}" for n in numbers) + "\n"


def prepare_folder(folder: Path, files: Mapping[str, Path], servings: Mapping[str, Serving]) -> Path:
    """Make a server's folders and unpack its archives; returns their folder.

    TorchServe itself would take three times as long to unpack them.
    """
    for sub in ("store", "logs", "tmp", "run"):
        (folder / sub).mkdir()
    for name, file in files.items():
        unpacked = folder / "store" / name
        unpacked.mkdir()
        unpack(file, unpacked)
        packed = (unpacked / SERVING_FILE).read_text(encoding="utf-8")
        serving = servings[name] if name in servings else Serving.from_yaml(packed)
        if packed != serving.to_yaml():  # an older archive's lacks keys
            configure_unpacked(unpacked, serving)
    return folder / "store"


def free_ports(count: int) -> List[int]:
    """Return unused ports of the loopback address."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def demands_keys(host: str, front: FrontendOptions) -> bool:
    """Whether every request needs a key."""
    return front.keys and not is_only_local(host)


def check_host(host: str, ipv6: bool) -> None:
    """Raise ServerError for a name, but localhost; and for an IPv6 address where the engine does not listen on any."""
    try:
        if not is_only_local(host):
            ipaddress.ip_address(host)
    except ValueError:
        raise ServerError(f"--host should be an IP address or localhost, not {host}") from None
    if ":" in host and not ipv6:
        raise ServerError(
            f"TorchServe binds no IPv6 address, such as --host {host}; --host 0.0.0.0 listens on IPv6 too"
        )


# One file of limited size. TorchServe's default writes five, and halves the throughput. The workers' output for every
# batch is filtered out; requests are not logged. The frontend's exceptions quote the request in their messages (a
# form, a path, a header), so only one line is logged, with the exception's class and its position in the code.
_LOG_CONFIG = """<?xml version="1.0" encoding="UTF-8"?>
<Configuration status="error">
  <Appenders>
    <RollingFile name="file" fileName="FOLDER/server.log" filePattern="FOLDER/server.%i.log">
      <PatternLayout pattern="%d{ISO8601} %-5p %m%n"/>
      <Policies><SizeBasedTriggeringPolicy size="10 MB"/></Policies>
      <DefaultRolloverStrategy max="3"/>
      <RegexFilter regex="Backend received inference at.*" onMatch="DENY" onMismatch="ACCEPT"/>
    </RollingFile>
    <RollingFile name="requests" fileName="FOLDER/server.log" filePattern="FOLDER/server.%i.log">
      <PatternLayout alwaysWriteExceptions="false" pattern="%d{ISO8601} %-5p TorchServe refused a request: EXCEPTION%n"/>
      <Policies><SizeBasedTriggeringPolicy size="10 MB"/></Policies>
      <DefaultRolloverStrategy max="3"/>
    </RollingFile>
  </Appenders>
  <Loggers>
    <Root level="warn"><AppenderRef ref="file"/></Root>
    <Logger name="org.pytorch.serve.http.HttpRequestHandler" level="error" additivity="false">
      <AppenderRef ref="requests"/>
    </Logger>
    <!-- It warns of each connection to the management API's Unix socket, which has no TCP options. -->
    <Logger name="io.netty.bootstrap.ServerBootstrap" level="error"/>
    <Logger name="MODEL_LOG" level="info"/>
    <Logger name="ACCESS_LOG" level="off"/>
    <Logger name="TS_METRICS" level="off"/>
    <Logger name="MODEL_METRICS" level="off"/>
    <Logger name="TELEMETRY_METRICS" level="off"/>
  </Loggers>
</Configuration>
""".replace(
    "EXCEPTION",
    r"%replace{%ex{short}}{(?s)^\s*([\w.$]+).*$}{$1} in %ex{short.className}, line %ex{short.lineNumber}",
)


_JAVA_LOGGING = """handlers=java.util.logging.FileHandler
.level=WARNING
java.util.logging.FileHandler.pattern=FOLDER/java.%g.log
java.util.logging.FileHandler.limit=1000000
java.util.logging.FileHandler.count=2
java.util.logging.FileHandler.formatter=java.util.logging.SimpleFormatter
java.util.logging.SimpleFormatter.format=%1$tF %1$tT %4$s %3$s%n
"""


METRICS = """ts_metrics:
  counter:
    - {name: Requests2XX, unit: Count, dimensions: [Level, Hostname]}
    - {name: Requests4XX, unit: Count, dimensions: [Level, Hostname]}
    - {name: Requests5XX, unit: Count, dimensions: [Level, Hostname]}
    - {name: ts_inference_requests_total, unit: Count, dimensions: [model_name, model_version, hostname]}
    - {name: ts_inference_latency_microseconds, unit: Microseconds, dimensions: [model_name, model_version, hostname]}
    - {name: ts_queue_latency_microseconds, unit: Microseconds, dimensions: [model_name, model_version, hostname]}
  gauge:
    - {name: QueueTime, unit: Milliseconds, dimensions: [Level, Hostname]}
    - {name: WorkerThreadTime, unit: Milliseconds, dimensions: [Level, Hostname]}
    - {name: WorkerLoadTime, unit: Milliseconds, dimensions: [WorkerName, Level, Hostname]}
model_metrics:
  counter:
    - {name: traceserve_requests_total, unit: count, dimensions: [ModelName, Level]}
    - {name: traceserve_tokens_total, unit: count, dimensions: [ModelName, Level]}
    - {name: traceserve_windows_total, unit: count, dimensions: [ModelName, Level]}
    - {name: traceserve_computed_tokens_total, unit: count, dimensions: [ModelName, Level]}
    - {name: traceserve_micro_batches_total, unit: count, dimensions: [ModelName, Level]}
    - {name: traceserve_model_seconds_total, unit: s, dimensions: [ModelName, Level]}
    - {name: traceserve_handler_seconds_total, unit: s, dimensions: [ModelName, Level]}
    - {name: traceserve_errors_total, unit: count, dimensions: [reason, ModelName, Level]}
  histogram:
    - {name: traceserve_batch_seconds, unit: s, dimensions: [ModelName, Level]}
  gauge:
    - {name: traceserve_last_batch_padding_ratio, unit: ratio, dimensions: [ModelName, Level]}
    - {name: traceserve_last_batch_model_seconds, unit: s, dimensions: [ModelName, Level]}
    - {name: PredictionTime, unit: ms, dimensions: [ModelName, Level]}
"""
