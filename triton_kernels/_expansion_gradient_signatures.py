# SPDX-License-Identifier: Apache-2.0
"""What the kernels of `expansion` that add to gradients take, per launch row: variants to compile, and signatures.

Nothing is compiled here.
"""

from __future__ import annotations

from collections.abc import Iterator

from pylearngene.triton_kernels._row import MOST_GENES, Row
from pylearngene.triton_kernels._signature import ITEMSIZE, Signature, Variant, gene_strides, two_strides
from pylearngene.triton_kernels._splits import halvings, sums_per_tile
from pylearngene.triton_kernels._table import GROUP


def variants(row: Row) -> Iterator[Variant]:
    """The specializations of a row that are compiled: its most genes in each dtype, and each use of the kernel."""
    if row.kernel == "accumulate":
        last = ("fp64", "fp64") if row.irregular else ("fp32", "bf16")
        for gene, panel in (("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), last):
            yield Variant("dots", MOST_GENES, gene, panel)
        yield Variant("no dots", MOST_GENES, "fp32", "fp32")
        return
    counts = {gene: min(MOST_GENES, row.weight_bytes // ITEMSIZE[gene]) for gene in ("bf16", "fp32", "fp16")}
    for form in ("dots",) if row.irregular else ("dots", "no dots", "split"):
        for gene in ("bf16",) if form == "split" else ("bf16", "fp32"):
            yield Variant(form, 1 if form == "split" else counts[gene], gene, "bf16")
    yield Variant("dots", counts["fp16"], "fp16", "fp16")
    for count in (1, 2, 4):
        if count < counts["bf16"]:
            yield Variant("dots", count, "bf16", "bf16")


def _gene_gradients(row: Row, variant: Variant) -> Signature:
    made, count, odd = Signature(), variant.genes, row.irregular
    made.argument("dy", f"*{variant.x}", aligned=not odd)
    made.argument("x", f"*{variant.x}", aligned=not odd)
    made.tuple_of("genes", f"*{variant.gene}", count, aligned=not odd)
    made.tuple_of("buffers", "*fp32", count)
    for name in ("coeffs", "dots"):
        made.argument(name, "*fp32")
    for name in ("tokens", "chunk"):
        made.argument(name, "i32", aligned=False)
    for name in ("outs", "inner"):
        made.argument(name, "i32", aligned=not odd)
    two_strides(made, "dy", odd)
    two_strides(made, "x", odd)
    gene_strides(made, variant, False, odd)
    dots, split = variant.form == "dots", variant.form == "split"
    wanted = 0 if split else 2**count - 1
    values = (*row.tile, GROUP, halvings(row), sums_per_tile(row), wanted, dots, not odd, split, False)
    names = ("BLOCK_OUT", "BLOCK_INNER", "BLOCK_TOKENS", "GROUP", "HALVINGS", "WARPS", "WANTED", "DOTS", "REGULAR")
    for name, value in zip((*names, "SPLIT", "UPCAST"), values, strict=True):
        made.constant(name, value)
    return made


def _accumulate(row: Row, variant: Variant) -> Signature:
    made, work, odd = Signature(), "*fp64" if variant.gene == "fp64" else "*fp32", row.irregular
    made.argument("panel", f"*{variant.x}", aligned=not odd)
    made.tuple_of("genes", f"*{variant.gene}", variant.genes, aligned=not odd)
    made.tuple_of("buffers", work, variant.genes)
    for name in ("coeffs", "dots"):
        made.argument(name, work)
    made.argument("rows", "i32", aligned=False)
    made.argument("cols", "i32", aligned=not odd)
    for name in ("first_row", "splits"):
        made.argument(name, "i32", aligned=False)
    made.argument("panel_row", "i32", aligned=not odd)
    gene_strides(made, variant, False, odd)
    values = (*row.tile, sums_per_tile(row), 2**variant.genes - 1, variant.form == "dots", not odd)
    for name, value in zip(("BLOCK_ROWS", "BLOCK_COLS", "WARPS", "WANTED", "DOTS", "REGULAR"), values, strict=True):
        made.constant(name, value)
    return made


SIGNATURES = {"gene_gradients": _gene_gradients, "accumulate": _accumulate}
