# SPDX-License-Identifier: Apache-2.0
"""What the compiled kernels of `expansion` refuse, and every message; nothing is computed here."""

from __future__ import annotations

from typing import Any

import pytest

from pylearngene import _C

KERNELS = _C.expansion
SIZES = {"M": 0, "I": 0, "O": 0}
PANEL = {"rows": 0, "cols": 0}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "synthesize": {"dst": 8, "dst_dtype": 0, **PANEL, "dst_row_stride": 0},
    "rows_forward": {"y": 8, "x": 8, "x_dtype": 0, **SIZES, "x_row_stride": 0, "y_row_stride": 0},
    "rows_dx": {"dx": 8, "dy": 8, "dy_dtype": 0, **SIZES, "dy_row_stride": 0, "dx_row_stride": 0},
    "accumulate": {"dw": 8, "dw_dtype": 0, **PANEL, "dw_row_stride": 0},
    "rows_wgrad": {"dy": 8, "x": 8, "x_dtype": 0, **SIZES, "dy_row_stride": 0, "x_row_stride": 0},
}
GRADS: dict[str, Any] = {"buffers": [(0, 0)], "dots": 0}
ENDS = {"rows_forward": {"bias": 0, "bias_genes": [], "bias_dtype": 0}, "accumulate": GRADS, "rows_wgrad": GRADS}


def refused(kernel: str, message: str, **changed: Any) -> None:
    """The call works as it is (nothing to compute) and is refused with `message` once arguments are changed."""
    start = {"level": 0, "threads": 1, "genes": [(8, 0, 1)], "gene_dtype": 0, "coeffs": 8}
    good = start | ARGUMENTS[kernel] | ENDS.get(kernel, {})
    assert set(changed) <= set(good)
    getattr(KERNELS, kernel)(**good)
    with pytest.raises(ValueError, match=f"^{message}$"):
        getattr(KERNELS, kernel)(**{**good, **changed})


@pytest.mark.parametrize("kernel", ARGUMENTS)
def test_refusals_of_every_kernel(kernel: str) -> None:
    dtype = next(name for name in ARGUMENTS[kernel] if name.endswith("_dtype"))
    last = len(_C.levels())
    refused(kernel, f"level: expected 0 to {last - 1}, got {last}", level=last)
    refused(kernel, f"level: expected 0 to {last - 1}, got -1", level=-1)
    refused(kernel, "threads: expected at least 1, got 0", threads=0)
    refused(kernel, "threads: expected at most 4096, got 4097", threads=4097)
    refused(kernel, f"{dtype}: expected 0 to 3, got 4", **{dtype: 4})
    refused(kernel, "gene_dtype: expected 0 to 3, got -1", gene_dtype=-1)
    refused(kernel, f"{dtype}: expected float64 exactly where gene_dtype is, got 1", **{dtype: 1})
    refused(kernel, f"{dtype}: expected float64 exactly where gene_dtype is, got 0", gene_dtype=1)
    refused(kernel, "genes: expected 1 to 64, got 0", genes=[])
    refused(kernel, "genes: expected 1 to 64, got 65", genes=[(8, 0, 1)] * 65)
    refused(kernel, "genes: expected tuples of 3 integers, got tuple", genes=[(8, 0)])
    refused(kernel, "genes: expected tuples of 3 integers, got int", genes=[8])
    refused(kernel, "coeffs: expected an address, got 0", coeffs=0)
    sizes = dict.fromkeys((SIZES | PANEL).keys() & ARGUMENTS[kernel], 1)
    for size in sizes:
        refused(kernel, f"{size}: expected at least 0, got -1", **{size: -1})
        refused(kernel, rf"{size}: expected less than 2\^57, got {2**57}", **{size: 2**57})
    refused(kernel, "genes: expected an address, got 0", genes=[(0, 0, 1)], **sizes)
    for name in {"dst", "y", "x", "dx", "dy", "dw"} & ARGUMENTS[kernel].keys():
        refused(kernel, f"{name}: expected an address, got 0", **{name: 0}, **sizes)


#: Names of the row strides of each kernel; those of its results must reach over a row.
STRIDES = {
    kernel: [name for name in arguments if name.endswith("_row_stride")] for kernel, arguments in ARGUMENTS.items()
}
RESULTS = {"dst", "y", "dx"}


@pytest.mark.parametrize("kernel", ARGUMENTS)
def test_refusals_of_strides_and_addresses(kernel: str) -> None:
    sizes = dict.fromkeys((SIZES | PANEL).keys() & ARGUMENTS[kernel], 5)
    strides = dict.fromkeys(STRIDES[kernel], 5)
    fits = {**sizes, **strides}
    for stride in (2**55, 2**62, 2**63 - 1):
        span = rf"expected less than 2\^57 bytes, got 5 x 5 with strides {stride} and 1"
        refused(kernel, f"genes: {span}", genes=[(8, stride, 1)], **fits)
        for name in STRIDES[kernel]:
            refused(kernel, f"{name.removesuffix('_row_stride')}: {span}", **{**fits, name: stride})
    wide = r"genes: expected less than 2\^57 bytes, got 5 x 5 with strides 5 and "
    refused(kernel, f"{wide}{2**56}", genes=[(8, 5, 2**56)], **fits)
    refused(kernel, "genes: expected strides of at least 0, got -5", genes=[(8, -5, 1)], **fits)
    refused(kernel, "genes: expected strides of at least 0, got -1", genes=[(8, 5, -1)], **fits)
    for name in STRIDES[kernel]:
        matrix = name.removesuffix("_row_stride")
        refused(kernel, f"{matrix}: expected strides of at least 0, got -1", **{**fits, name: -1})
        if matrix in RESULTS:
            refused(kernel, f"{matrix}: expected a row stride of at least 5, got 4", **{**fits, name: 4})
    for name in ARGUMENTS[kernel].keys() & {"dst", "y", "x", "dx", "dy", "dw"}:
        refused(kernel, f"{name}: expected an address, got {2**57}", **{**fits, name: 2**57})
    refused(kernel, f"coeffs: expected an address, got {2**64 - 1}", coeffs=2**64 - 1)
    refused(kernel, f"genes: expected an address, got {2**64 - 8}", genes=[(-8, 0, 1)])
    if kernel in ("accumulate", "rows_wgrad"):
        refused(kernel, "buffers: expected a row stride of at least 5, got 0", buffers=[(8, 0)], **fits)
        refused(kernel, f"buffers: expected an address, got {2**63 - 1}", buffers=[(2**63 - 1, 5)], **fits)
        refused(kernel, f"dots: expected an address, got {2**57}", dots=2**57)


def test_refusals_of_lists() -> None:
    refused("accumulate", r"buffers: expected 1 \(one per gene\), got 2", buffers=[(0, 0)] * 2)
    refused("rows_wgrad", r"buffers: expected 1 \(one per gene\), got 0", buffers=[])
    refused("rows_wgrad", "buffers: expected tuples of 2 integers, got tuple", buffers=[(0, 0, 0)])
    refused("rows_wgrad", "buffers: expected integers in its tuples, got float", buffers=[(0, 0.0)])
    refused("rows_wgrad", "buffers: expected integers of 64 bits in its tuples, got a larger one", buffers=[(2**63, 0)])
    two = [(8, 1, 0)] * 2
    refused("rows_forward", r"bias_genes: expected 1 \(one per gene\), got 2", bias_genes=two)
    refused("rows_forward", "bias_genes: expected an empty list beside a bias, got 1", bias=8, bias_genes=two[:1])
    refused("rows_forward", "bias_dtype: expected 0 to 3, got 9", bias=8, bias_dtype=9)
    refused("rows_forward", "bias_dtype: expected float64 exactly where gene_dtype is, got 1", bias=8, bias_dtype=1)


def test_unsupported_level_is_refused() -> None:
    if not (missing := set(_C.levels()) - set(_C.supported_levels())):
        pytest.skip("this processor runs every level that is compiled")
    for name in missing:
        message = f"level: expected one this processor can run, got {name}"
        refused("synthesize", message, level=_C.levels().index(name))
