"""A server's keys: the files that hold them, and new ones in their place.

TorchServe makes its own, and new ones on request, which its third key may make. Ray's replicas read theirs from a
file at each request. Every such file is readable by its user alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
from pathlib import Path
from typing import Any, Dict, Optional

from traceserve_hosts import KEY_VARIABLE

from traceserve.errors import ServerError
from traceserve.serving import instances, management
from traceserve.serving.engines import RAY
from traceserve.serving.instances import Instance

_KEY_BYTES = 24
_KINDS = ("inference", "management")


def torchserve_keys(folder: Path) -> Dict[str, str]:
    """Return TorchServe's keys in a server's folder; raises FileNotFoundError, ValueError or KeyError until it has them."""
    found: Dict[str, Any] = json.loads((folder / "run" / "key_file.json").read_text(encoding="utf-8"))
    return {kind: found[kind]["key"] for kind in (*_KINDS, "API")}


def ray_key_file(folder: Path) -> Path:
    """Return the file of a cluster's key."""
    return folder / "run" / "key"


def user_key() -> str:
    """Return the user's key, which all containers of a deployment share, or a new one."""
    return os.environ.get(KEY_VARIABLE) or secrets.token_urlsafe(_KEY_BYTES)


def write_key(file: Path, key: str) -> None:
    """Write a key into a file that this user alone may read, in place of an earlier one's; whole at any moment."""
    new = file.with_name(f".{file.name}.new")
    with contextlib.suppress(FileNotFoundError):
        new.unlink()
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(key + "\n")
    os.replace(new, file)


def key_in(file: Path) -> str:
    """Return the key in a file; raises ServerError for one that holds anything else."""
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ServerError(f"--key-file {file} cannot be read: {error}") from None
    if not key or len(key.split()) > 1:
        raise ServerError(f"--key-file {file} should hold one key, and nothing else")
    return key


def current(instance: Instance) -> Instance:
    """Return a server with the keys that it demands now, and remember them; raises ServerError if it demands none."""
    if instance.key is None:
        raise ServerError(
            f"the server on port {instance.port} demands no key: it listens on the loopback address, or was started with "
            "--without-keys"
        )
    folder, management_key = Path(instance.folder), instance.management_key
    try:
        if instance.engine == RAY:
            key = ray_key_file(folder).read_text(encoding="utf-8").strip()
        else:
            found = torchserve_keys(folder)
            key, management_key = found["inference"], found["management"]
    except (OSError, ValueError, KeyError) as error:
        raise ServerError(
            f"the keys of the server on port {instance.port} cannot be read in {folder}: {error}"
        ) from None
    return _remembered_with(instance, key, management_key)


def rotate_keys(instance: Instance, key: Optional[str] = None) -> Instance:
    """Give a server new keys, from now on in place of the old ones; raises ServerError. A Ray cluster takes the user's."""
    instance = current(instance)
    folder = Path(instance.folder)
    if instance.engine == RAY:
        write_key(ray_key_file(folder), key or secrets.token_urlsafe(_KEY_BYTES))
        return current(instance)
    if key is not None:
        raise ServerError(
            f"TorchServe, on port {instance.port}, makes its keys itself and takes none; a key of your own needs --engine ray"
        )
    maker = dataclasses.replace(instance, management_key=torchserve_keys(folder)["API"])
    for kind in _KINDS:
        management.call(maker, "GET", f"/token?type={kind}")
    return current(instance)


def _remembered_with(instance: Instance, key: str, management_key: Optional[str]) -> Instance:
    found = dataclasses.replace(instance, key=key, management_key=management_key)
    if found != instance:
        instances.remember(found)
    return found
