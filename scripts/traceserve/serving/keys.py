"""A server's keys: the files that hold them, and new ones in their place.

TorchServe makes its own, and new ones on request, which its third key may make. Ray's replicas read theirs from a
file at each request. Every such file is readable by its user alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import stat
from pathlib import Path
from typing import Any, Dict, Optional

from traceserve_hosts.keys import given_key

from traceserve.errors import ServerError, unread_reason
from traceserve.machine.private_files import write_private
from traceserve.serving import instances, management
from traceserve.serving.engines import RAY
from traceserve.serving.instances import Instance
from traceserve.serving.update_lock import alone

_KEY_BYTES = 24
_KINDS = ("inference", "management")


def torchserve_keys(folder: Path) -> Dict[str, str]:
    """Return TorchServe's keys in a server's folder; raises FileNotFoundError, ValueError or KeyError until it has them."""
    found: Dict[str, Any] = json.loads((folder / instances.TORCHSERVE_KEYS).read_text(encoding="utf-8"))
    return {kind: found[kind]["key"] for kind in (*_KINDS, "API")}


def ray_key_file(folder: Path) -> Path:
    """Return the file of a cluster's key."""
    return folder / instances.RAY_KEY


def user_key() -> str:
    """Return the user's key, which all containers of a deployment share, or a new one; raises ServerError for a blank one."""
    try:
        return given_key() or secrets.token_urlsafe(_KEY_BYTES)
    except ValueError as error:
        raise ServerError(f"{error} for a random one") from None


def write_key(file: Path, key: str) -> None:
    """Write a key into a file that this user alone may read, in place of an earlier one's; whole at any moment. Raises
    NoSpace."""
    write_private(file, key + "\n", chosen=True)


def check_key_target(file: Path) -> None:
    """Raise ServerError for a path in whose place no file with a key may be put, such as a device, a link or a folder."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(file.lstat().st_mode):
            raise ServerError(
                f"--write {file} exists and is no regular file, which the key's file would replace; name another"
            )


def key_in(file: Path) -> str:
    """Return the key in a file; raises ServerError for one that holds anything else."""
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ServerError(f"--key-file {file} cannot be read: {unread_reason(error)}") from None
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
        if not key:
            raise ValueError("there is an empty one")
    except (OSError, ValueError, KeyError) as error:
        raise ServerError(
            f"the keys of the server on port {instance.port} cannot be read in {folder}: {error}"
        ) from None
    return _remembered_with(instance, key, management_key)


def rotate_keys(instance: Instance, key: Optional[str] = None) -> Instance:
    """Give a server new keys, from now on in place of the old ones; raises ServerError. A Ray cluster takes the user's.

    Not while an update runs, which goes on with the keys that it began with.
    """
    with alone(instance) as found:
        return _rotated(current(found), key)


def _rotated(instance: Instance, key: Optional[str]) -> Instance:
    folder = Path(instance.folder)
    if instance.engine == RAY:
        write_key(ray_key_file(folder), key or secrets.token_urlsafe(_KEY_BYTES))
        return current(instance)
    if key is not None:
        raise ServerError(
            f"TorchServe, on port {instance.port}, makes its keys itself and takes none; a key of your own needs --engine ray"
        )
    maker = dataclasses.replace(instance, management_key=torchserve_keys(folder)["API"])
    try:
        for kind in _KINDS:
            management.call(maker, "GET", f"/token?type={kind}")
    finally:  # the first may have been replaced although the second was not
        instance = current(instance)
    return instance


def _remembered_with(instance: Instance, key: str, management_key: Optional[str]) -> Instance:
    found = dataclasses.replace(instance, key=key, management_key=management_key)
    if found != instance:
        instances.remember(found)
    return found
