"""The commands of `traceserve`, in the order of --help; the only modules that print."""

from typing import Tuple

from traceserve.commands import (
    bench,
    build,
    demo,
    deploy,
    doctor,
    init,
    inspect,
    playground,
    predict,
    serve,
    show,
    status,
    tune,
)
from traceserve.commands.contract import Command

COMMANDS: Tuple[Command, ...] = tuple(
    command
    for module in (init, build, inspect, serve, status, predict, bench, tune, deploy, playground, doctor, demo, show)
    for command in module.COMMANDS
)
