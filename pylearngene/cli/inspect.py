# SPDX-License-Identifier: Apache-2.0
"""`pylearngene inspect FOLDER`: what a gene folder holds, after the same checks as any other load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pylearngene.cli._app import JsonOption
from pylearngene.cli._output import print_json
from pylearngene.cli.report.table import text_table
from pylearngene.learngene import Learngene
from pylearngene.methods import ExpansionMethod  # noqa: F401  (importing it registers the methods)


def command(
    folder: Annotated[Path, typer.Argument(help="A folder with gene_config.json and gene.safetensors.")],
    json: JsonOption = False,
) -> None:
    """List the method, the host and the tensors of a gene folder."""
    lg = Learngene.from_pretrained(folder)
    facts = describe(lg)
    if json:
        print_json(facts)
        return
    host = facts["host"]
    settings = ", ".join(f"{key}={value}" for key, value in facts["method"].items() if key != "name")
    typer.echo(f"method      {facts['method']['name']}{f' ({settings})' if settings else ''}")
    typer.echo(f"host        {host['family']}, blocks at {host['blocks']}, taken at depth {host['depth']}")
    typer.echo(f"parameters  {facts['parameters']:,} in {len(facts['tensors'])} tensors, {facts['bytes']:,} bytes")
    rows = [
        [row["group"], row["name"], "x".join(map(str, row["shape"])) or "scalar", row["dtype"], f"{row['bytes']:,}"]
        for row in facts["tensors"]
    ]
    typer.echo(text_table(["group", "tensor", "shape", "dtype", "bytes"], rows, right={4}))


def describe(lg: Learngene) -> dict[str, Any]:
    """Return method, host and tensors of a learngene as plain values."""
    rows: list[dict[str, Any]] = [
        {
            "group": group,
            "name": name,
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "bytes": tensor.numel() * tensor.element_size(),
        }
        for group, tensors in (("gene", lg.genes), ("plain", lg.tensors), ("coefficients", lg.coeffs))
        for name, tensor in tensors.items()
    ]
    host = {"family": lg.host.family, "blocks": lg.host.blocks, "depth": lg.host.depth}
    return {
        "method": {"name": lg.method.name, **lg.method.to_config()},
        "host": {**host, "layers": [list(layer) for layer in lg.host.layers]},
        "parameters": lg.num_parameters,
        "bytes": sum(row["bytes"] for row in rows),
        "tensors": rows,
    }
