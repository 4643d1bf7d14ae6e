# SPDX-License-Identifier: Apache-2.0
"""`pylearngene env`: versions, the machine, and which implementation runs per operation, and why."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import typer

from pylearngene import backends
from pylearngene.cli._app import JsonOption
from pylearngene.cli._output import print_json
from pylearngene.cli.report.machine import machine, versions
from pylearngene.cli.report.table import text_table


def command(json: JsonOption = False) -> None:
    """Show versions, the machine and the backend of each operation, with how to get a faster one."""
    facts: dict[str, Any] = {
        "versions": versions(),
        "machine": machine(),
        "backends": [asdict(report) for report in backends()],
    }
    if json:
        print_json(facts)
        return
    typer.echo("  ".join(f"{name} {version}" for name, version in facts["versions"].items() if version))
    missing = [name for name, version in facts["versions"].items() if not version]
    if missing:
        typer.echo(f"not installed: {', '.join(missing)}")
    for name, value in facts["machine"].items():
        typer.echo(f"{name}: {value}")
    rows = [[row["op"], row["device"], row["backend"], row["reason"]] for row in facts["backends"]]
    typer.echo(text_table(["op", "device", "backend", "why"], rows))
    for row in facts["backends"]:
        if row["command"]:
            typer.echo(f"faster {row['op']} on {row['device']}: {row['command']}")
