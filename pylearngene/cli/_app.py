# SPDX-License-Identifier: Apache-2.0
"""The typer application, the one place where exceptions become exit codes, and options that commands share."""

from __future__ import annotations

import signal
import sys
import traceback
from typing import Annotated, Any

import torch
import typer
from typer.core import TyperGroup

from pylearngene.errors import ArgumentError, PylearngeneError
from pylearngene.training import processes


class _Guarded(TyperGroup):
    """Turns every exception of a command into a line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except (Exception, KeyboardInterrupt) as error:
            if hasattr(error, "format_message"):  # a usage error, which the parser itself explains
                raise
            raise _explained(error) from error


def _explained(error: BaseException) -> typer.Exit:
    """Say on stderr why the command ends, once for all processes of a run; returns the exit."""
    run = processes.current()
    error = run.failed(error)
    text = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        text = "interrupted"
    elif not isinstance(error, PylearngeneError):
        traceback.print_exception(error)
        text = f"internal error: {error}"
    if run.first_to_say(text):
        print(f"pylearngene: {text}", file=sys.stderr, flush=True)
    run.leave()
    return typer.Exit(processes.exit_code(error))


def join() -> processes.Processes:
    """Return the processes that a launcher started for this command; one that it then terminates cleans up first."""
    run = processes.join()
    if run.world > 1:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    return run


def device_of(name: str) -> torch.device:
    """The device that an option names, for this process.

    Raises:
        ArgumentError: it is not the name of one, or there is none here.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ArgumentError(f"device: expected cpu, cuda or cuda:N, got {name!r}") from error
    there = 1 if device.type == "cpu" else torch.cuda.device_count() if device.type == "cuda" else 0
    if (device.index or 0) >= there:
        raise ArgumentError(f"device: expected one that is here, got {name!r}")
    return processes.current().device(device)


app = typer.Typer(
    cls=_Guarded,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Learngenes: networks of any depth grown from a few shared tensors.",
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON on stdout, and only that.")]
DataOption = Annotated[
    str | None,
    typer.Option("--data", help="Folder with the four idx files (plain or .gz), or 'digits'.", metavar="PATH"),
]
DownloadOption = Annotated[bool, typer.Option("--download", help="Download Fashion-MNIST if it is not here.")]
InstallOption = Annotated[
    bool, typer.Option("--install-data", help="Install the system package dataset-fashion-mnist (apt-get) if missing.")
]
