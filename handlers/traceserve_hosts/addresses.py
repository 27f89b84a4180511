"""Who reaches an address."""

from __future__ import annotations

import ipaddress


def is_only_local(host: str) -> bool:
    """Whether only this machine reaches what listens there; not of a name, which may be of any address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
