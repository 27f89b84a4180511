"""Ray Serve as a host: `archive` and `router` build the applications that `ray_config` names.

A replica is its own ingress: it holds one archive, and answers HTTP itself. `serve.batch` is not used: it gathers calls of one
method, but knows neither clients that have gone nor pieces of a stream; `batcher` does, and hands the whole list to one thread.
"""

from __future__ import annotations

import asyncio
from typing import Any, AsyncGenerator, AsyncIterator, Dict, List, Mapping, Optional

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.util.metrics import Counter, Histogram
from starlette.middleware.cors import CORSMiddleware

from traceserve_hosts.asgi import (
    Application,
    Asgi,
    Limits,
    Message,
    Receive,
    Scope,
    Send,
    key_from_environment,
    path_of,
)
from traceserve_hosts.batcher import Batcher
from traceserve_hosts.loading import load_archive
from traceserve_hosts.ray_config import NAMING, NEURON_CORES, Replicas
from traceserve_hosts.routing import Router, may_stream, messages

_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0]  # TorchServe's buckets
ARCHIVE = "archive"  # the deployment of every application, so that a new version updates the old one's replicas
_HEALTH_PERIOD = 2.0  # seconds after which Ray notices that a replica's process has ended
_CANARY_HOLDS = 10.0  # seconds: asking the model each time would take processor time from requests
_SECONDS_OF_CANARY = 20.0  # a third of Ray's own timeout; later the queue's progress decides
_SECONDS_BEFORE_MORE, _SECONDS_BEFORE_FEWER = 5.0, 60.0  # that the number of requests calls for them
_GRACE = 120.0  # seconds in which a replica that goes may finish what it was asked


def archive(args: Mapping[str, Any]) -> serve.Application:
    """The application of one archive; `args` as `ray_config` makes them."""
    replicas, options = Replicas(**args["replicas"]), args["options"]
    own: Dict[str, Any] = {"num_replicas": replicas.least}
    if replicas.most > replicas.least:
        own = {
            "autoscaling_config": {
                "min_replicas": replicas.least,
                "max_replicas": replicas.most,
                "target_ongoing_requests": replicas.ongoing,
                "upscale_delay_s": _SECONDS_BEFORE_MORE,
                "downscale_delay_s": _SECONDS_BEFORE_FEWER,
            }
        }
    deployment = replica.options(
        name=ARCHIVE,
        ray_actor_options=_actor_options(replicas),
        max_ongoing_requests=options["queue"] + 256,  # the replica itself says when too many wait
        logging_config={"enable_access_log": False},
        health_check_period_s=_HEALTH_PERIOD,
        health_check_timeout_s=3 * _SECONDS_OF_CANARY,
        graceful_shutdown_timeout_s=_GRACE,
        max_surge_percent=replicas.surge,
        **own,
    )
    return deployment.bind(
        args["archive"],
        args["sha256"],
        args["name"],
        args["version"],
        replicas.gpus > 0,
        options,
        args.get("trusted"),
    )


def _actor_options(replicas: Replicas) -> Dict[str, Any]:
    """What a replica's process needs of a machine."""
    cores = {"resources": {NEURON_CORES: replicas.neuron_cores}} if replicas.neuron_cores else {}
    return {"num_cpus": replicas.cpus, "num_gpus": replicas.gpus, **cores}


def router(args: Mapping[str, Any]) -> serve.Application:
    """The application at the root, where several archives are served."""
    deployment = front.options(
        ray_actor_options={"num_cpus": 0},  # what it does is little, and must find a place beside the replicas
        max_ongoing_requests=args["options"]["queue"],
        graceful_shutdown_timeout_s=_GRACE,
        max_surge_percent=100,  # the next one starts before this one ends, for which nobody else answers
        logging_config={"enable_access_log": False},
    )
    return deployment.bind(args["models"], args["options"])


@serve.ingress()
class Replica:
    """One process with one archive."""

    def __init__(
        self,
        address: str,
        sha256: Optional[str],
        name: str,
        version: str,
        gpu: bool,
        options: Mapping[str, Any],
        trusted: Optional[str] = None,
    ) -> None:
        _stay_on_loopback()
        loaded = load_archive(address, sha256, name, version, gpu, trusted)
        self._metrics = _Metrics(name, version)
        self._application = Application(
            loaded.service,
            Batcher(loaded.service, loaded.batch_size, loaded.batch_delay, self._metrics.report),
            _limits(options, loaded.timeout),
        )
        self._counted = _Counted(self._application, f"/predictions/{name}/{version}/", self._metrics)
        self._origin = options["cors_origin"]

    def __serve_build_asgi_app__(self) -> Asgi:
        return _with_cors(self._counted, self._origin)

    async def check_health(self) -> None:
        """Ray asks this every two seconds, and replaces a replica that fails three times."""
        problem = await self._application.broken(_SECONDS_OF_CANARY, _CANARY_HOLDS)
        if problem is not None:
            raise RuntimeError(problem)

    async def answered(self, scope: Scope, body: bytes) -> List[Message]:
        """All messages of an answer, for the router."""
        return [message async for message in self.answering(scope, body)]

    async def answering(self, scope: Scope, body: bytes) -> AsyncIterator[Message]:
        """The messages of an answer as they come, for the router."""
        async for message in messages(self._application, scope, body):
            yield message


@serve.ingress()
class Front:
    """The router's process."""

    def __init__(self, models: Mapping[str, Mapping[str, Mapping[str, Any]]], options: Mapping[str, Any]) -> None:
        _stay_on_loopback()
        self._options = options
        self._handles: Dict[str, DeploymentHandle] = {}
        self._router = Router(
            {name: {v: each["share"] for v, each in versions.items()} for name, versions in models.items()},
            _limits(options, 120.0),
            self._messages,
        )
        self._applications = {(n, v): each["application"] for n, vs in models.items() for v, each in vs.items()}

    def __serve_build_asgi_app__(self) -> Asgi:
        return _with_cors(self._router, self._options["cors_origin"])

    async def _messages(self, name: str, version: str, scope: Scope, body: bytes) -> AsyncGenerator[Message, None]:
        application = self._applications[name, version]
        handle = self._handles.get(application)
        if handle is None:
            handle = self._handles[application] = serve.get_app_handle(application)
        streamed = may_stream(scope, body)
        asked = (handle.options(stream=True).answering if streamed else handle.answered).remote(scope, body)
        try:
            if streamed:
                async for message in asked:
                    yield message
            else:
                for message in await asked:
                    yield message
        except (asyncio.CancelledError, GeneratorExit):  # the client has gone
            asked.cancel()
            raise


class _Counted:
    """An application, whose requests that name the version in their path are counted: an update looks whether there are
    any."""

    def __init__(self, application: Asgi, path: str, metrics: _Metrics) -> None:
        self._application = application
        self._path = path
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and f"{path_of(scope)}/".startswith(self._path):
            self._metrics.count_naming()
        await self._application(scope, receive, send)


replica: Any = serve.deployment(Replica)
front: Any = serve.deployment(Front)


def _limits(options: Mapping[str, Any], timeout: float) -> Limits:
    return Limits(key_from_environment(), options["largest_body"], options["queue"], timeout)


def _with_cors(application: Asgi, origin: Optional[str]) -> Asgi:
    if origin is None:
        return application
    headers = ["content-type", "authorization"]
    wrapped: Asgi = CORSMiddleware(application, [origin], ["GET", "POST"], headers)
    return wrapped


def _stay_on_loopback() -> None:
    """Where this node's address is the loopback's, let the replica's gRPC server for handles listen there, not everywhere.

    `add_port_to_grpc_server` is a private name of Ray (2.60). Where it is gone, the server listens as Ray has it.
    """
    from ray.serve._private import replica as module

    listen = getattr(module, "add_port_to_grpc_server", None)
    own = ray.util.get_node_ip_address()
    if listen is not None and own.startswith("127."):
        module.add_port_to_grpc_server = lambda server, address: listen(server, address.replace("[::]", own))


class _Metrics:
    """What TorchServe's worker counts, by the same names; Ray puts `ray_` before them."""

    def __init__(self, name: str, version: str) -> None:
        self._tags = {"model_name": name, "model_version": version}
        self._counters: Dict[str, Counter] = {}
        self._seconds = Histogram("traceserve_batch_seconds", boundaries=_SECONDS, tag_keys=tuple(self._tags))
        self._errors = Counter("traceserve_errors_total", tag_keys=(*self._tags, "reason"))
        self._naming = Counter(NAMING, tag_keys=tuple(self._tags))

    def count_naming(self) -> None:
        """Add a request that names the version in its path."""
        self._naming.inc(1, self._tags)

    def report(self, stats: Any, calls: int, seconds: float) -> None:
        """Add what one batch was."""
        for reason, failed in stats.errors.items():
            self._errors.inc(failed, {**self._tags, "reason": reason})
        if not stats.micro_batches:
            return
        self._seconds.observe(seconds, self._tags)
        for name, count in stats.counters(calls, seconds).items():
            if name not in self._counters:
                self._counters[name] = Counter(name, tag_keys=tuple(self._tags))
            if count > 0:  # Ray refuses nothing to add
                self._counters[name].inc(count, self._tags)
