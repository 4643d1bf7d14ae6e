# SPDX-License-Identifier: Apache-2.0
"""What the kernels of `expansion` that add to gradients take, per launch row: variants to compile, and signatures.

Nothing is compiled here.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton.language as tl
from pylearngene.triton_kernels._row import MOST_GENES, Row
from pylearngene.triton_kernels._signature import ITEMSIZE, Signature, Variant, gene_strides, two_strides
from pylearngene.triton_kernels._table import GROUP


def variants(row: Row) -> Iterator[Variant]:
    """The specializations of a row that are compiled: its most genes in each dtype, and each use of the kernel."""
    if row.kernel == "accumulate":
        for gene, out in (("bf16", "bf16"), ("fp32", "fp32"), ("fp64", "fp64")):
            yield Variant("rows", MOST_GENES, gene, out)
        yield Variant("transposed", MOST_GENES, "fp32", "fp32")
        return
    counts = [(min(MOST_GENES, row.weight_bytes // ITEMSIZE[gene]), gene) for gene in ("bf16", "fp32")]
    forms = ("dots", "no dots")
    for form in forms[:1] if row.irregular else forms:
        for count, gene in counts:
            yield Variant(form, count, gene, "bf16")


def _gene_gradients(row: Row, variant: Variant) -> Signature:
    made, count, odd = Signature(), variant.genes, row.irregular
    made.argument("dy", f"*{variant.x}", aligned=not odd)
    made.argument("x", f"*{variant.x}", aligned=not odd)
    made.tuple_of("genes", f"*{variant.gene}", count, aligned=not odd)
    made.tuple_of("buffers", "*fp32", count)
    for name in ("coeffs", "dots"):
        made.argument(name, "*fp32")
    made.argument("tokens", "i32", aligned=False)
    for name in ("outs", "inner"):
        made.argument(name, "i32", aligned=not odd)
    two_strides(made, "dy", odd)
    two_strides(made, "x", odd)
    gene_strides(made, variant, False, odd)
    values = (*row.tile, GROUP, 2**count - 1, variant.form != "no dots", tl.int64 if odd else tl.int32, False)
    names = ("BLOCK_OUT", "BLOCK_INNER", "BLOCK_TOKENS", "GROUP", "WANTED", "DOTS", "INDEX", "UPCAST")
    for name, value in zip(names, values, strict=True):
        made.constant(name, value)
    return made


def _accumulate(row: Row, variant: Variant) -> Signature:
    made, work = Signature(), "*fp64" if variant.gene == "fp64" else "*fp32"
    made.argument("panel", f"*{variant.x}")
    made.tuple_of("genes", f"*{variant.gene}", variant.genes)
    made.tuple_of("buffers", work, variant.genes)
    for name in ("coeffs", "dots"):
        made.argument(name, work)
    for name in ("rows", "cols", "first_row", "panel_row"):
        made.argument(name, "i32")
    gene_strides(made, variant, variant.form == "transposed")
    values = (*row.tile, 2**variant.genes - 1, True, tl.int64)
    for name, value in zip(("BLOCK_ROWS", "BLOCK_COLS", "WANTED", "DOTS", "INDEX"), values, strict=True):
        made.constant(name, value)
    return made


SIGNATURES = {"gene_gradients": _gene_gradients, "accumulate": _accumulate}
