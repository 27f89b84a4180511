"""`ray start` of a further node on the loopback address: `python node.py start --address=127.0.0.1:PORT ...`.

Ray's own command replaces 127.0.0.1 by the address of a network interface, where the head does not listen.
"""

from __future__ import annotations

import ray._private.services as services
from ray.scripts.scripts import main

services.resolve_ip_for_localhost = lambda host: host

if __name__ == "__main__":
    main()
