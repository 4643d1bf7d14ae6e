# SPDX-License-Identifier: Apache-2.0
"""The typer application and the one place where exceptions become exit codes."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pylearngene.errors import PylearngeneError

INTERNAL_ERROR = 1
INTERRUPTED = 130


class _Guarded(TyperGroup):
    """Turns every exception of a command into a line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PylearngeneError as error:
            print(f"pylearngene: {' '.join(str(error).split())}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            print("pylearngene: interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from error
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if hasattr(error, "format_message"):  # a usage error, which the parser itself explains
                raise
            traceback.print_exc()
            print(f"pylearngene: internal error: {error}", file=sys.stderr)
            raise typer.Exit(INTERNAL_ERROR) from error


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
