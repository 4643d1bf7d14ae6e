# SPDX-License-Identifier: Apache-2.0
"""What the kernels of `expansion` that form W take, per launch row: the variants to compile and their signatures.

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
    if row.kernel == "synthesize":
        for gene, out in (("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("fp32", "bf16")):
            yield Variant("rows", 2 * MOST_GENES if row.irregular else row.weight_bytes // ITEMSIZE[gene], gene, out)
        if row.irregular:
            yield Variant("rows", MOST_GENES, "fp64", "fp64")
            yield Variant("transposed", MOST_GENES, "fp32", "bf16")
            return
        for count in (1, 2, 4, 8, 16):
            yield Variant("rows", count, "bf16", "bf16")
        yield Variant("rows", MOST_GENES, "fp32", "bf16")
        return
    if row.kernel == "finish":
        for gene in ("bf16", "fp32"):
            yield Variant("forward", MOST_GENES, gene, "bf16")
        yield Variant("plain", 1, "fp16", "fp16")
        return
    counts = {gene: min(MOST_GENES, row.weight_bytes // ITEMSIZE[gene]) for gene in ("bf16", "fp32", "fp16")}
    for form in ("forward",) if row.irregular else ("forward", "dx"):
        yield Variant(form, counts["bf16"], "bf16", "bf16")
        yield Variant(f"{form} split", counts["bf16"], "bf16", "bf16")
        if not row.candidate:
            yield Variant(form, counts["fp32"], "fp32", "bf16")
    if row.candidate:
        return
    yield Variant("forward", counts["fp16"], "fp16", "fp16")
    for count in (1, 2, 4):
        if count < counts["bf16"]:
            yield Variant("forward", count, "bf16", "bf16")


def _fused(row: Row, variant: Variant) -> Signature:
    made, count, odd = Signature(), variant.genes, row.irregular
    split = variant.form.endswith("split")
    made.argument("y", "*fp32" if split else f"*{variant.x}")
    made.argument("x", f"*{variant.x}", aligned=not odd)
    made.tuple_of("genes", f"*{variant.gene}", count, aligned=not odd)
    made.argument("coeffs", "*fp32")
    biased = variant.form == "forward"
    made.tuple_of("biases", f"*{variant.gene if biased else 'fp32'}", count if biased else 1)
    made.argument("tokens", "i32", aligned=False)
    for name in ("outs", "inner"):
        made.argument(name, "i32", aligned=not odd)
    made.argument("chunk", "i32", aligned=False)
    two_strides(made, "x", odd)
    gene_strides(made, variant, variant.form.startswith("dx"), odd)
    activation = "gelu" if biased and row.activations else "relu" if biased else None
    index = tl.int64 if odd else tl.int32
    end = ("genes" if biased else None, activation, index, False, split, row.persistent and not split, row.stay)
    names = ("BLOCK_OUT", "BLOCK_TOKENS", "BLOCK_INNER", "GROUP", "BIAS", "ACTIVATION", "INDEX", "UPCAST")
    for name, value in zip((*names, "SPLIT", "PERSISTENT", "STAY"), (*row.tile, GROUP, *end), strict=True):
        made.constant(name, value)
    return made


def _finish(row: Row, variant: Variant) -> Signature:
    made, biased = Signature(), variant.form == "forward"
    made.argument("y", f"*{variant.x}")
    made.argument("partials", "*fp32")
    made.argument("coeffs", "*fp32")
    made.tuple_of("biases", f"*{variant.gene}", variant.genes)
    for name in ("splits", "tokens", "outs"):
        made.argument(name, "i32", aligned=False)
    end = ("genes", "gelu") if biased else ("plain", None)
    names = ("BLOCK_OUT", "BLOCK_TOKENS", "BIAS", "ACTIVATION")
    for name, value in zip(names, (*row.tile, *end), strict=True):
        made.constant(name, value)
    return made


def _synthesize(row: Row, variant: Variant) -> Signature:
    made, odd = Signature(), row.irregular
    made.argument("out", f"*{variant.x}", aligned=not odd)
    made.tuple_of("genes", f"*{variant.gene}", variant.genes, aligned=not odd)
    made.argument("coeffs", "*fp64" if variant.gene == "fp64" else "*fp32")
    for name in ("rows", "cols", "first_row", "first_col", "out_row"):
        made.argument(name, "i32", aligned=not odd and name not in ("rows", "first_row"))
    across = variant.form == "transposed"
    gene_strides(made, variant, across, odd and not across)
    for name, value in zip(("BLOCK_ROWS", "BLOCK_COLS"), row.tile, strict=True):
        made.constant(name, value)
    return made


SIGNATURES = {"fused": _fused, "finish": _finish, "synthesize": _synthesize}
