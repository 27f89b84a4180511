"""The models that the page asks: those of running servers, by name, and any other, by its URL."""

from __future__ import annotations

import re
import urllib.parse
from dataclasses import dataclass, replace
from typing import List, Optional, Sequence, Tuple

from traceserve_runtime.manifest import DEFAULT_VERSION

from traceserve.errors import ServerError
from traceserve.playground import description
from traceserve.playground.description import Description
from traceserve.serving import client, instances
from traceserve.serving.client import Address
from traceserve.serving.instances import Instance

_PATH = re.compile(r"(?P<before>.*?)/predictions/(?P<name>[^/]+)(/(?P<version>[^/]+))?/?")


@dataclass(frozen=True)
class Model:
    """A model, where it answers, and how it describes itself."""

    url: str  # of the server
    description: Description
    key: Optional[str] = None
    certificate: Optional[str] = None
    any_name: bool = True  # whether the certificate may be for another name than the URL's

    @property
    def address(self) -> Address:
        """The server's address, with its key and certificate."""
        return Address(self.url, self.key, self.certificate, self.any_name)

    @property
    def path(self) -> str:
        """Behind /predictions/: the name and the version."""
        return _path(self.description.name, self.description.version)


def find_model(place: str, key: Optional[str] = None, certificate: Optional[str] = None) -> Model:
    """NAME, an archive that a server of this user serves, or the URL of a model; raises ServerError."""
    if "://" in place:
        return _at(place, key, certificate)
    otherwise = ", and any other server is named by its URL, like http://127.0.0.1:8080/predictions/NAME"
    serving = instances.serving_instances(place, otherwise)
    if len(serving) > 1:
        urls = ", ".join(instance.predictions_url(place) for instance in serving)
        raise ServerError(f"{place} is served {len(serving)} times; name one by its URL: {urls}")
    return _of(serving[0], place, key)


def every() -> Tuple[List[Model], List[ServerError]]:
    """All archives of all running servers of this user, and why some are left out; raises ServerError where there is none."""
    running = instances.running()
    if not running:
        raise instances.none_running()
    found: List[Model] = []
    failed: List[ServerError] = []
    for instance, name in [(one, name) for one in running for name in one.names]:
        try:
            found.append(_of(instance, name, None))
        except ServerError as error:
            failed.append(error)
    if not found:
        raise failed[0]
    return found, failed


def check_comparable(models: Sequence[Model]) -> None:
    """Raise ServerError for models that cannot be asked the same."""
    tasks = {model.description.task for model in models}
    if len(tasks) > 1:
        said = " and ".join(f"{model.description.name}'s is {model.description.task}" for model in models)
        raise ServerError(f"two archives side by side have one task, but {said}")


def _of(instance: Instance, name: str, key: Optional[str]) -> Model:
    version = instance.manifest(name).version
    return _described(replace(instance.address, key=key or instance.key), name, version)


def _at(place: str, key: Optional[str], certificate: Optional[str]) -> Model:
    parts = urllib.parse.urlsplit(place)
    path = _PATH.fullmatch(parts.path)
    if parts.scheme not in ("http", "https") or not parts.hostname or not path or parts.query or "@" in parts.netloc:
        raise ServerError(
            f"{place} is no URL of a model; it should look like http://127.0.0.1:8080/predictions/NAME, or with the version "
            f"behind it if that is not {DEFAULT_VERSION}"
        )
    url = f"{parts.scheme}://{parts.netloc}{path['before']}"
    address = Address(url, key, certificate, any_name=False)
    ours = next((one for one in instances.running() if one.url == url), None)  # its key and certificate are known
    if ours is not None:
        address = Address(url, key or ours.key, certificate or ours.certificate, any_name=certificate is None)
    name = urllib.parse.unquote(path["name"])
    return _described(address, name, path["version"] or DEFAULT_VERSION)


def _described(address: Address, name: str, version: str) -> Model:
    document = client.get_document(address, f"predictions/{_path(name, version)}/openapi.json")
    described = description.read_description(document, f"{address.url}/predictions/{name}")
    return Model(address.url, described, address.key, address.certificate, address.any_name)


def _path(name: str, version: str) -> str:
    return f"{urllib.parse.quote(name, safe='')}/{urllib.parse.quote(version, safe='')}"
