"""completion: the shell's Tab key knows the commands, options, archives and served names."""

from __future__ import annotations

import argparse
import os
from pathlib import PurePath
from typing import Any, Callable, Dict, List

from traceserve.commands.contract import Command

_SHELLS = ("bash", "zsh", "fish", "powershell")
_TEXT = """\
Print the script that completes `traceserve` on Tab.

For good: add the line of your shell to its start-up file.

  bash  ~/.bashrc                    eval "$(traceserve completion bash)"
  zsh   ~/.zshrc, after compinit     eval "$(traceserve completion zsh)"
  fish  ~/.config/fish/config.fish   traceserve completion fish | source
"""


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", nargs="?", choices=_SHELLS, help=f"{', '.join(_SHELLS)} [yours, by $SHELL]")


def _run(options: argparse.Namespace) -> int:
    from argcomplete.shell_integration import shellcode

    own = PurePath(os.environ.get("SHELL", "")).name
    shell = options.shell or (own if own in _SHELLS else _SHELLS[0])
    print(shellcode(["traceserve"], shell=shell))
    return 0


class CompletingParser(argparse.ArgumentParser):
    """A parser whose arguments are completed by what stands for them in --help."""

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:  # noqa: ANN401 - argparse's own
        action = super().add_argument(*names, **options)
        completer = _COMPLETERS.get(str(action.metavar))
        if completer and action.default is None:  # `serve` takes a port that is free
            action.completer = completer  # type: ignore[attr-defined]
        return action

    def complete(self) -> None:
        """Answer the shell and exit, if Tab was pressed."""
        if "_ARGCOMPLETE" in os.environ:
            import argcomplete

            argcomplete.autocomplete(self)


def _archives(prefix: str, **context: object) -> List[str]:
    from argcomplete.completers import FilesCompleter

    return list(FilesCompleter(("mar",))(prefix))


def _served(prefix: str, **context: object) -> List[str]:
    from traceserve.serving import instances

    return sorted({name for instance in instances.running() for name in instance.names})


def _ports(prefix: str, **context: object) -> List[str]:
    from traceserve.serving import instances

    return [str(instance.port) for instance in instances.running()]


def _tasks(prefix: str, **context: object) -> List[str]:
    from traceserve_runtime.tasks import TASKS

    return list(TASKS)


def _targets(prefix: str, **context: object) -> List[str]:
    from traceserve.deploying.targets import TARGETS

    return list(TARGETS)


# By what stands for an argument in --help. Others are files, or have choices.
_COMPLETERS: Dict[str, Callable[..., List[str]]] = {
    "ARCHIVE": _archives,
    "NAME": _served,
    "NAME|URL": _served,
    "NAME|URL|ARCHIVE": lambda prefix, **context: [*_served(prefix), *_archives(prefix)],
    "P": _ports,
    "TARGET": _targets,
    "TASK": _tasks,
}

COMMANDS = (Command("completion", _TEXT, _add, _run),)
