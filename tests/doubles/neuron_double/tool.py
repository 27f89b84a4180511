"""`neuron-ls --json-output`: a list of devices, or exit code 1 without any."""

from __future__ import annotations

import json
import sys

from neuron_double import cores


def main() -> int:
    if not cores.count():
        print('level=fatal msg="Failed to load MLA system information"', file=sys.stderr)
        return 1
    device = {
        "neuron_device": 0,
        "bdf": "0000:00:1f.0",
        "connected_to": None,
        "nc_count": cores.count(),
        "memory_size": 8589934592,
        "neuron_processes": [{"pid": owner} for owner in cores.owners()],
    }
    print(json.dumps([device], indent=4))
    return 0


if __name__ == "__main__":
    sys.exit(main())
