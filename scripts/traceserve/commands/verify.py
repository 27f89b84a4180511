"""verify: ask a live server the golden set of its archive."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Optional, Tuple

from traceserve_runtime.errors import TraceserveError

from traceserve.commands.arguments import add_port, quantity, require_archive
from traceserve.commands.contract import Command
from traceserve.commands.printing import (
    answer_in_brief,
    console,
    figure,
    print_line,
    print_note,
    printable,
    printable_json,
)

if TYPE_CHECKING:
    from traceserve.checking.verifying import AskedServer, Verification
    from traceserve.serving.instances import Instance

_SHOWN, _LONGEST = 12, 60  # rows, and characters of an answer


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "place",
        metavar="NAME|URL|ARCHIVE",
        help="a served archive's name; any server's URL, with --archive; or the .mar whose server on this machine is verified",
    )
    parser.add_argument(
        "--archive",
        type=Path,
        metavar="FILE",
        help="the .mar whose golden set is asked [the one that the server unpacked, for NAME]",
    )
    parser.add_argument("--key", metavar="KEY", help="for a URL: the server's key for predictions [known for NAME]")
    parser.add_argument(
        "--key-file",
        type=Path,
        metavar="FILE",
        help="for a URL: a file with that key, which ps and history do not show",
    )
    parser.add_argument(
        "--certificate", type=Path, metavar="FILE", help="for a URL with https://: the certificate to trust"
    )
    parser.add_argument(
        "--seconds", type=quantity, default=8.0, metavar="S", help="ask no more samples after this time [%(default)g s]"
    )
    parser.add_argument(
        "--texts", action="store_true", help="show the answers to your own samples too, which quote them"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_port(parser)


def _verify(options: argparse.Namespace) -> int:
    from traceserve.checking.verifying import verify_server

    server, archive = _asked_server(options)
    found = verify_server(server, archive, options.seconds)
    if options.json:
        print(printable_json(found.document(options.texts), indent=2))
    else:
        _print_verification(found, options.texts)
    return int(not found.passed)


def _asked_server(options: argparse.Namespace) -> Tuple[AskedServer, Path]:
    """Return the server and the archive with the golden set; raises TraceserveError."""
    from traceserve.checking.verifying import AskedServer
    from traceserve.serving import instances

    if "://" in options.place:
        if options.port is not None:
            raise TraceserveError("verify: --port is for a name; a URL has its own")
        if options.archive is None:
            raise TraceserveError("verify: a URL needs --archive FILE.mar, which brings the golden set")
        certificate = str(options.certificate) if options.certificate else None
        return AskedServer(options.place, options.place, _key(options), certificate), options.archive
    _check_for_url(options)
    archive: Optional[Path] = options.archive
    name = options.place
    if name.endswith(".mar"):
        archive, name = archive or Path(name), Path(name).stem
        require_archive(archive)
    instance = instances.serving_instance(name, options.port, or_url=True)
    if archive is not None:
        _check_task(archive, instance, name)
    return AskedServer.of(instance, name), archive or instance.unpacked(name)


def _check_for_url(options: argparse.Namespace) -> None:
    """Raise TraceserveError for an option that would have no effect, since no URL is asked with it."""
    given = {"--key": options.key, "--key-file": options.key_file, "--certificate": options.certificate}
    for option, value in given.items():
        if value is not None:
            raise TraceserveError(
                f"verify: {option} is for URLs, not for {options.place}: of a server on this machine it is known"
            )


def _check_task(archive: Path, instance: Instance, name: str) -> None:
    """Raise TraceserveError for an archive of another task than the served one: none of its samples would be answered."""
    from traceserve.checking.proof import manifest_of

    own, served = manifest_of(archive).task, instance.manifest(name).task
    if own != served:
        raise TraceserveError(
            f"verify: {archive} is for the task {own}, but {name} on port {instance.port} for {served}; leave --archive out, or "
            "give the archive that it serves"
        )


def _key(options: argparse.Namespace) -> Optional[str]:
    if options.key_file is None:
        return options.key or None
    if options.key is not None:
        raise TraceserveError("verify: give --key or --key-file, not both")
    from traceserve.serving.keys import key_in

    return key_in(options.key_file)


def _print_verification(found: Verification, with_texts: bool) -> None:
    asked = f"{len(found.samples)} of {found.of}" if len(found.samples) < found.of else str(found.of)
    build = f" (the build, in its process: {figure(found.build_p50)} ms)" if found.build_p50 is not None else ""
    largest = f"largest difference of a score {found.largest_difference:.1e} (limit {found.limit:.1e})"
    comparable = any(each.difference is not None for each in found.samples)
    print_line(
        f"{found.server.label}: {asked} samples asked ({found.endpoint.dialect.name}), p50 {figure(found.p50)} ms{build}, "
        f"{largest if comparable else 'no scores are comparable'}"
    )
    if found.different:
        _print_different(found, with_texts)
    for note in found.notes:
        print_note(note)
    for problem in found.problems:
        print_note(problem, "different")
    if found.passed:
        print_note(f"it answers as {_expected_of(found)} does", "verified")


def _print_different(found: Verification, with_texts: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    others = ["the original"] if found.by_own_texts else []
    table = Table("sample", _expected_of(found), *others, "the server", "difference", box=None, header_style="dim")
    for each in found.different[:_SHOWN]:
        hidden = each.own and not with_texts
        name = f"#{each.number}" + (" (yours)" if each.own else "")
        told = printable(each.error or "") or (
            "(--texts shows it)" if hidden else answer_in_brief(each.answer, _LONGEST)
        )
        expected = "" if hidden else answer_in_brief(each.expected, _LONGEST)
        difference = f"{each.difference:.1e}" if each.difference is not None else "changed"
        original = each.expected if each.original is None else each.original
        beside = [Text("" if hidden else answer_in_brief(original, _LONGEST))] if others else []
        table.add_row(name, Text(expected), *beside, Text(told), difference)
    console().print(table, highlight=False)
    if len(found.different) > _SHOWN:
        print_line(f"and {len(found.different) - _SHOWN} more; --json has all")


def _expected_of(found: Verification) -> str:
    return "the archive at its build" if found.by_own_texts else "the original"


COMMANDS = (
    Command(
        "verify",
        "Ask a live server its archive's golden set.\n\nAn archive carries samples with the original model's answers (built-in "
        "ones; your own only if you built it with\n--samples FILE --keep-samples). They are asked through the server's own "
        "door, one at a time, within ten seconds, and\njudged by the rule of the gate: no answer may change in float32, few in a "
        "lower precision, scores within the limit. Texts in a lower\nprecision must be those that the archive wrote at its "
        "build, up to its first near tie.\nThe server's version and hash must be the archive's, too. Run it after "
        "each rollout, and after each update of a library.\n\n"
        "  traceserve verify NAME\n  traceserve verify model_store/NAME.mar\n"
        "  traceserve verify https://models.example.org/predictions/NAME --archive NAME.mar --key-file key.txt\n\n"
        "A URL may speak our own protocol, V2 (.../v2/models/NAME) or Hugging Face's: the first in which it answers is "
        "taken.\n\nexit code: 0 verified; 1 something differs; 2 the server could not be asked, or the archive has no golden set",
        _add_verify,
        _verify,
        finds_servers=True,
        trouble=2,
    ),
)
