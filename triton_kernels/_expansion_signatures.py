# SPDX-License-Identifier: Apache-2.0
"""What the kernels of `expansion` that form W take, per launch row: the variants to compile and their signatures.

Nothing is compiled here.
"""

from __future__ import annotations

from collections.abc import Iterator

from pylearngene.triton_kernels._row import MOST_GENES, Row
from pylearngene.triton_kernels._signature import ITEMSIZE, Signature, Variant, gene_strides, two_strides
from pylearngene.triton_kernels._table import GROUP


def variants(row: Row) -> Iterator[Variant]:
    """The specializations of a row that are compiled: its most genes in each dtype, and each use of the kernel."""
    if row.kernel == "synthesize":
        for gene, out in (("bf16", "bf16"), ("fp32", "fp32"), ("fp64", "fp64")):
            yield Variant("rows", MOST_GENES, gene, out)
        yield Variant("transposed", MOST_GENES, "fp32", "bf16")
        return
    counts = [(min(MOST_GENES, row.weight_bytes // ITEMSIZE[gene]), gene) for gene in ("bf16", "fp32")]
    forms = ("forward", "dx")
    for form in forms[:1] if row.irregular else forms:
        for count, gene in counts:
            yield Variant(form, count, gene, "bf16")
    if row.weight_bytes == 8:
        yield Variant("forward", 2, "bf16", "bf16")


def _fused(row: Row, variant: Variant) -> Signature:
    made, count, odd = Signature(), variant.genes, row.irregular
    made.argument("y", f"*{variant.x}")
    made.argument("x", f"*{variant.x}", aligned=not odd)
    made.tuple_of("genes", f"*{variant.gene}", count, aligned=not odd)
    made.argument("coeffs", "*fp32")
    biased = variant.form == "forward"
    made.tuple_of("biases", f"*{variant.gene if biased else 'fp32'}", count if biased else 1)
    made.argument("tokens", "i32", aligned=False)
    for name in ("outs", "inner"):
        made.argument(name, "i32", aligned=not odd)
    two_strides(made, "x", odd)
    gene_strides(made, variant, variant.form == "dx", odd)
    activation = "gelu" if biased and row.activations else "relu" if biased else None
    values = (*row.tile, GROUP, "genes" if biased else None, activation, False)
    names = ("BLOCK_OUT", "BLOCK_TOKENS", "BLOCK_INNER", "GROUP", "BIAS", "ACTIVATION", "UPCAST")
    for name, value in zip(names, values, strict=True):
        made.constant(name, value)
    return made


def _synthesize(row: Row, variant: Variant) -> Signature:
    made = Signature()
    made.argument("out", f"*{variant.x}")
    made.tuple_of("genes", f"*{variant.gene}", variant.genes)
    made.argument("coeffs", "*fp64" if variant.gene == "fp64" else "*fp32")
    for name in ("rows", "cols", "first_row", "first_col", "out_row"):
        made.argument(name, "i32")
    gene_strides(made, variant, variant.form == "transposed")
    for name, value in zip(("BLOCK_ROWS", "BLOCK_COLS"), row.tile, strict=True):
        made.constant(name, value)
    return made


SIGNATURES = {"fused": _fused, "synthesize": _synthesize}
