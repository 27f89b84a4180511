"""keys: what a server demands of its clients, and new ones."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from traceserve.commands.arguments import add_port, require_writable
from traceserve.commands.contract import Command
from traceserve.commands.printing import print_line

_LONGEST = 1024  # bytes of a file that --write replaces


def _add_keys(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rotate", action="store_true", help="make new keys; the server refuses the old ones from now on"
    )
    parser.add_argument(
        "--key-file",
        type=Path,
        metavar="FILE",
        help="with --rotate, on Ray: take the key in this file [a new, random one]",
    )
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="write the inference key into FILE, which you alone may read, for --key-file of other commands; print none",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_port(parser)


def _keys(options: argparse.Namespace) -> int:
    from traceserve.errors import ServerError
    from traceserve.serving import instances, keys

    if options.key_file and not options.rotate:
        raise ServerError("keys: --key-file needs --rotate")
    if options.write:
        keys.check_key_target(options.write)
        _check_replaced(options.write)
    require_writable(options.write)
    instance = instances.find_instance(options.port)
    wanted = keys.key_in(options.key_file) if options.key_file else None
    found = keys.rotate_keys(instance, wanted) if options.rotate else keys.current(instance)
    if options.write:
        keys.write_key(options.write, str(found.key))
        print_line(f"the key of port {found.port} is in {options.write}")
    elif options.json:
        print(json.dumps({"port": found.port, "inference": found.key, "management": found.management_key}, indent=2))
    else:
        _print_keys(found.key, found.management_key)
    return 0


def _check_replaced(file: Path) -> None:
    """Raise ServerError for an existing file that holds more than a key: it would be lost."""
    from traceserve.errors import ServerError

    if file.is_file():
        with file.open("rb") as stream:
            content = stream.read(_LONGEST + 1)
        if len(content) > _LONGEST or len(content.split()) > 1:
            raise ServerError(
                f"--write {file} exists and holds more than a key, which would be lost; name another file"
            )


def _print_keys(inference: object, management: object) -> None:
    print_line(f"inference   {inference}")
    if management:
        print_line(f"management  {management}")
    print_line(f"\n  -H 'Authorization: Bearer {inference}'")


COMMANDS = (
    Command(
        "keys",
        "Show the keys that a server demands, or make new ones.\n\nA server beyond the loopback address answers nobody without "
        "its key. Keys are random, lie in files that only their\nuser may read (mode 0600), and are valid until they are "
        "rotated or the server stops. After --rotate the old ones are\nrefused at once, without a restart; the commands of "
        "this user know the new ones. TorchServe's third key, which makes the others, stays until the server stops.\n\n"
        "  traceserve keys\n  traceserve keys --rotate --port 8080\n"
        "  traceserve keys --write key.txt\n  "
        "traceserve verify https://HOST/predictions/NAME --archive NAME.mar --key-file key.txt",
        _add_keys,
        _keys,
        finds_servers=True,
    ),
)
