"""update: a new version beside the served one, under load."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict

from traceserve.commands.arguments import (
    add_port,
    add_samples,
    add_signature,
    number_in,
    positive,
    require_archive,
    zero_or_more,
)
from traceserve.commands.contract import Command
from traceserve.commands.printing import print_line, print_note

if TYPE_CHECKING:
    from traceserve.rollout.replaying import Replay
    from traceserve.rollout.updating import Updated

_SHOWN = 10


def _add_update(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "archive", type=Path, metavar="ARCHIVE", help="the new .mar, named as the served one, with another version"
    )
    parser.add_argument(
        "--allow-changes",
        type=zero_or_more,
        default=0,
        metavar="N",
        help="promote it although up to N answers differ from the running version's [%(default)s]",
    )
    add_samples(parser, "ask both versions these texts too,")
    parser.add_argument(
        "--shadow",
        type=_share,
        metavar="SHARE",
        help="then compare on live requests too: ask the new version this share of those that the running one answers, such as "
        "0.1; clients get the running version's answers, and no text is written anywhere",
    )
    parser.add_argument("--shadow-seconds", type=positive, default=30, metavar="S", help="for how long [%(default)s s]")
    parser.add_argument(
        "--workers",
        type=positive,
        metavar="N",
        help="its workers [the value that `traceserve tune` wrote into it, else as many as run now]",
    )
    parser.add_argument(
        "--timeout",
        type=positive,
        default=300,
        metavar="S",
        help="give up if its workers are not ready, or the old version has requests, after this time [%(default)s s]",
    )
    add_signature(parser, " [the key that the server was started with, if any]")
    parser.add_argument("--json", action="store_true", help="print JSON at the end, without any text of a request")
    add_port(parser)


def _share(text: str) -> float:
    """Parse a number above 0, up to 1."""
    number = number_in(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError("should be above 0, and at most 1 for all")
    return number


def _update(options: argparse.Namespace) -> int:
    require_archive(options.archive)
    from traceserve.building.samples import OwnSamples
    from traceserve.rollout.shadowing import ShadowOptions
    from traceserve.rollout.updating import UpdateOptions, UpdateRefused, update_server

    wanted = UpdateOptions(
        workers=options.workers,
        allowed_changes=options.allow_changes,
        samples=OwnSamples.read(options.samples) if options.samples else None,
        shadow=ShadowOptions(options.shadow, options.shadow_seconds) if options.shadow else None,
        timeout=options.timeout,
        trusted=options.require_signature,
    )
    try:
        found = update_server(
            options.archive,
            options.port,
            wanted,
            lambda text: print_line(text, error=options.json),
        )
    except UpdateRefused as error:
        if error.replay is not None:
            _print_moved(error.replay)
        raise
    if options.json:
        print(json.dumps(_document(found), indent=2))
    else:
        print_note(f"{found.name} {found.old} to {found.new} in {found.seconds:.1f} s", "updated")
    return 0


def _document(found: Updated) -> Dict[str, Any]:
    shadowed = found.shadowed
    return {
        "name": found.name,
        "url": found.instance.url,
        "old": found.old,
        "new": found.new,
        "seconds": found.seconds,
        "verified": len(found.verification.samples),
        "compared": found.replay.asked,
        "changed": len(found.replay.moved),
        "largest_difference": found.replay.drift,
        "shadowed": None
        if shadowed is None
        else {
            "shown": shadowed.shown,
            "compared": shadowed.compared,
            "changed": len(shadowed.moved),
            "largest_difference": shadowed.drift,
        },
        "kept": found.kept,
    }


def _print_moved(replay: Replay) -> None:
    """Show what moved to what; never a text, nor an answer that is one."""
    from traceserve.checking.comparing import moves_of

    for one, other, count in moves_of(replay.moved)[:_SHOWN]:
        print_line(f"  {one} → {other}: {count}", error=True)


COMMANDS = (
    Command(
        "update",
        "Put a new version in place of a served one, under load.\n\nThe archive is started on the running server beside the old "
        "version, warmed up, verified by its golden set at its own\naddress, and asked the same as the old version: the golden "
        "sets of both, --samples, and with --shadow a share of the live\nrequests. Only if its answers hold (or up to "
        "--allow-changes differ) does it get the requests. Then the old version\nanswers those that it has, and is removed. No "
        "request fails; if anything else does, or on Ctrl-C, the new version is\nremoved and the old one stays.\n\n"
        "  traceserve build --version 2.0 --store model_store/new\n  traceserve update model_store/new/NAME.mar\n\n"
        "For that time both versions are in memory. An old version that requests name in their path "
        "(/predictions/NAME/1.0) is kept.\n\nexit code: 0 updated; 1 the old version answers as before",
        _add_update,
        _update,
        finds_servers=True,
    ),
)
