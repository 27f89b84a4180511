"""The commands of `traceserve`, in the order of --help; the only modules that print."""

from typing import Tuple

from traceserve.commands import (
    bench,
    build,
    completion,
    demo,
    deploy,
    diff,
    doctor,
    explain,
    init,
    inspect,
    keys,
    playground,
    predict,
    serve,
    show,
    sign,
    status,
    tune,
    update,
    verify,
)
from traceserve.commands.contract import Command

COMMANDS: Tuple[Command, ...] = tuple(
    command
    for module in (
        init,
        build,
        inspect,
        diff,
        sign,
        serve,
        update,
        status,
        keys,
        predict,
        explain,
        verify,
        bench,
        tune,
        deploy,
        playground,
        doctor,
        demo,
        show,
        completion,
    )
    for command in module.COMMANDS
)
