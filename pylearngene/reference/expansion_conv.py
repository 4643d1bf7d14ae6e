# SPDX-License-Identifier: Apache-2.0
"""Specification of `expansion_conv`: the convolution whose weight is a sum of genes, `W = sum_k c_k G_k`.

It is defined beside the linear layer, with the weight that both have.
Absent: pylearngene/functional/expansion_conv.py, because its function stands with those of `expansion`.
Absent: triton_kernels/expansion_conv.py, because on a GPU panels go to PyTorch's own convolution.
Absent: csrc/cuda/expansion_conv.cu, because on a GPU panels go to PyTorch's own convolution.
"""

from pylearngene.reference.expansion import conv2d

__all__ = ["conv2d"]
