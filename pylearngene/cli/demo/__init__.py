# SPDX-License-Identifier: Apache-2.0
"""`pylearngene demo`: the whole line on real images, with honest baselines and a report.

The command is here; the experiment, its baselines and the memory measurement are the modules beside it, tables,
plots and the page are in `pylearngene.cli.report`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from pylearngene.cli._app import DataOption, DownloadOption, InstallOption, JsonOption, join
from pylearngene.cli._output import print_json
from pylearngene.cli.demo.config import DemoConfig, full_config, quick_config
from pylearngene.cli.demo.experiment import run_demo
from pylearngene.cli.report.results import result_rows, without_losses
from pylearngene.cli.report.table import text_table
from pylearngene.data import DIGITS_BANNER, load

__all__ = ["DemoConfig", "command", "run_demo"]


def command(
    full: Annotated[bool, typer.Option("--full", help="Three seeds and 20,000 images: about 25 minutes.")] = False,
    seed: Annotated[int, typer.Option(help="Of the first run; --full also takes the next two.", min=0)] = 0,
    out: Annotated[Path, typer.Option(help="Output folder; replaced only if an earlier demo wrote it.")] = Path(
        "pylearngene-demo"
    ),
    data: DataOption = None,
    download: DownloadOption = False,
    install_data: InstallOption = False,
    json: JsonOption = False,
) -> None:
    """Train an ancestry network and its learngene, grow descendants of six depths, compare, write a report."""
    started = time.perf_counter()
    run_by = join()
    dataset = run_by.main_first(lambda: load(data, fetch=download, install=install_data))
    if dataset.name == "digits" and run_by.main:
        typer.echo(f"\n*** {DIGITS_BANNER} ***\n", err=True)
    config = full_config(out, seed) if full else quick_config(out, seed)
    results = run_demo(config, dataset, started=started)
    if not run_by.main:
        return
    if json:
        print_json(without_losses(results))
        return
    header, rows = result_rows(results)
    typer.echo(text_table(header, rows, right=set(range(len(header)))))
    typer.echo(f"\nWall time {results['timing']['wall_seconds']:.0f} s. Report: {out / 'report.html'}")
