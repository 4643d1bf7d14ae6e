# SPDX-License-Identifier: Apache-2.0
"""The products of `expansion` for a few tokens by the C++ module for CUDA: which calls it takes, and the calls.

What is not taken is computed in another way by `expansion_regimes`. The kernels are in csrc/cuda/expansion.cu.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from pylearngene import _backends, plan
from pylearngene._ops.expansion_kernels import CODES, gene_windows
from pylearngene.errors import BackendError


def rows_forward(
    y: Tensor,
    x: Tensor,
    genes: Sequence[Tensor],
    coeffs: Tensor,
    bias: Tensor | None,
    bias_genes: Sequence[Tensor] = (),
) -> bool:
    """`y = x W^T + b`, or False where it is not taken.

    Args:
        y: `[M, O]`, overwritten, in x's dtype.
        x: `[M, I]`.
        genes: K tensors `[O, I]`.
        coeffs: `[K]` float32, contiguous.
        bias: `[O]` in x's dtype, contiguous, or None.
        bias_genes: K tensors `[O]` that are combined instead, and rounded to x's dtype.

    Raises:
        BackendError: CUDA refuses the call; the message holds its words.
    """
    module = _backends.cuda_for(x.device)
    if module is None or not _taken(module, y, x, genes, bias, bias_genes):
        return False
    rows, cols = genes[0].shape
    device, stream = _queue(x.device)
    try:
        module.expansion.rows_forward(
            device,
            stream,
            y.data_ptr(),
            x.data_ptr(),
            CODES[x.dtype],
            x.shape[0],
            cols,
            rows,
            x.stride(0),
            y.stride(0),
            gene_windows(genes),
            CODES[genes[0].dtype],
            coeffs.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            [(gene.data_ptr(), gene.stride(0)) for gene in bias_genes],
            CODES[bias_genes[0].dtype] if bias_genes else 0,
        )
    except RuntimeError as error:
        raise BackendError(f"expansion on {x.device}: pylearngene._cuda: {error}") from error
    return True


def most_tokens(module: ModuleType, itemsize: int) -> int:
    """The most tokens that are taken: what the kernels hold where they were asked for, else what the plan prefers."""
    limit: int = module.expansion.most_tokens
    return limit if _backends.chosen() == "cuda" else min(limit, plan.CUDA_ROWS_UP_TO.get(itemsize, 0))


def _taken(
    module: ModuleType,
    y: Tensor,
    x: Tensor,
    genes: Sequence[Tensor],
    bias: Tensor | None,
    bias_genes: Sequence[Tensor],
) -> bool:
    if len(genes) > module.expansion.most_genes or x.shape[0] > most_tokens(module, x.element_size()):
        return False
    if not module.expansion.takes(CODES[x.dtype], CODES[genes[0].dtype]):
        return False
    if any(gene.dtype == torch.float64 for gene in bias_genes):
        return False
    matrices = (x, y, *genes)
    return all(matrix.stride(1) == 1 or matrix.shape[1] < 2 for matrix in matrices)


def _queue(device: torch.device) -> tuple[int, int]:
    """Number of the device and address of its current stream."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, torch._C._cuda_getCurrentRawStream(index)
