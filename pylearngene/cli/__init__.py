# SPDX-License-Identifier: Apache-2.0
"""The command line: one `pylearngene` command, with `demo`, `train`, `env`, `inspect` and `bench`.

Errors raised on purpose are one line on stderr with their own exit code. Results go to stdout, everything else
(bars, banners, messages) to stderr.
"""

from __future__ import annotations

from pylearngene.cli import bench, demo, env, inspect, train
from pylearngene.cli._app import app

__all__ = ["app", "main"]

app.command("demo")(demo.command)
app.command("train")(train.command)
app.command("env")(env.command)
app.command("inspect")(inspect.command)
app.command("bench")(bench.command)


def main() -> None:
    """Run the command line and leave the process with its exit code."""
    app(prog_name="pylearngene")
