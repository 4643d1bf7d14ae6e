# SPDX-License-Identifier: Apache-2.0
"""The convolutions of `expansion`: y, dx and the gradients of the genes, which go through panels of the weight.

What the native kernels take is computed by `expansion_conv_rows`, a 1x1 convolution whose pixels lie channels-last by
`expansion_regimes`. Else a panel is synthesized into one reused workspace and given to the vendor's convolution, as a
convolution with fewer channels: output channels for y and dW, input channels for dx, so that no partial sum is ever
rounded. Stride, dilation, groups and every dtype come with it. The vendor holds copies of a panel in layouts of its own
beside it (two at most, for dW one more per thread), never of a weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from pylearngene import plan
from pylearngene._ops import expansion_conv_rows as _rows
from pylearngene._ops import expansion_regimes as _regimes
from pylearngene._ops.expansion_kernels import accumulate, fill
from pylearngene._ops.expansion_products import Conv2d

#: Vendors block channels by up to this number; other panel heights cost them a remainder each.
BLOCK = 16
_convolution = torch.ops.aten.convolution.default
_backward = torch.ops.aten.convolution_backward.default


class Panel(NamedTuple):
    """A window of the weight that is a convolution of its own.

    Attributes:
        rows: its output channels.
        inner: its input channels, as a slice of the C/groups that the genes have.
        channels: those channels of x.
        groups: how many groups it covers.
    """

    rows: slice
    inner: slice
    channels: slice
    groups: int


def output_size(size: Sequence[int], weight: Sequence[int], conv: Conv2d) -> tuple[int, ...]:
    """The size of y: x `[B, C, H, W]`, weight `[O, C/groups, kh, kw]` -> `[B, O, H', W']`."""
    sides = [
        (size[2 + axis] + 2 * conv.padding[axis] - conv.dilation[axis] * (weight[2 + axis] - 1) - 1)
        // conv.stride[axis]
        + 1
        for axis in (0, 1)
    ]
    return (size[0], weight[0], *sides)


def forward(x: Tensor, genes: Sequence[Tensor], coeffs: Tensor, bias: Tensor | None, conv: Conv2d) -> Tensor:
    """`y = conv2d(x, W) + b`: x `[B, C, H, W]`, genes `[O, C/groups, kh, kw]`, bias in x's dtype.

    Args:
        x: any strides.
        genes: K tensors.
        coeffs: `[K]` in the work dtype.
        bias: `[O]` or None.
        conv: stride, padding, dilation, groups.
    """
    size = output_size(x.shape, genes[0].shape, conv)
    if _is_product(x, genes[0], conv):
        return _image(_regimes.forward(_pixels(x), _matrices(genes), coeffs, bias), size, x)
    y = _rows.forward(x, size, genes, coeffs, bias, conv)
    if y is not None:
        return y
    for panel, weight in _synthesized(x, genes, coeffs, conv.groups, by_output=True):
        part = _convolution(
            x[:, panel.channels], weight, None if bias is None else bias[panel.rows],
            conv.stride, conv.padding, conv.dilation, False, (0, 0), panel.groups,
        )  # fmt: skip
        y = _placed(y, part, panel.rows, size, x)
        del part  # the next panel's result is made in its place
    assert y is not None
    return y


def input_gradient(dy: Tensor, size: Sequence[int], genes: Sequence[Tensor], coeffs: Tensor, conv: Conv2d) -> Tensor:
    """`dx`: dy `[B, O, H', W']`, genes `[O, C/groups, kh, kw]` -> `size` `[B, C, H, W]`; panels are input channels."""
    if _is_product(dy, genes[0], conv):
        return _image(_regimes.input_gradient(_pixels(dy), _matrices(genes), coeffs), size, dy)
    dx = _rows.input_gradient(dy, size, genes, coeffs, conv)
    if dx is not None:
        return dx
    rest = [  # rows and columns of x that the last position of the kernel does not reach
        have - back
        for have, back in zip(
            size[2:],
            (
                (dy.shape[2 + axis] - 1) * conv.stride[axis]
                - 2 * conv.padding[axis]
                + conv.dilation[axis] * (genes[0].shape[2 + axis] - 1)
                + 1
                for axis in (0, 1)
            ),
            strict=True,
        )
    ]
    for panel, weight in _synthesized(dy, genes, coeffs, conv.groups, by_output=False):
        part = _convolution(
            dy[:, panel.rows], weight, None, conv.stride, conv.padding, conv.dilation, True, rest, panel.groups
        )
        dx = _placed(dx, part, panel.channels, size, dy)
        del part
    assert dx is not None
    return dx


def gene_gradients(
    buffers: Sequence[Tensor | None],
    dy: Tensor,
    x: Tensor,
    genes: Sequence[Tensor],
    coeffs: Tensor,
    need_dots: bool,
    conv: Conv2d,
) -> Tensor | None:
    """`buffers[k] += c_k dW`; returns `<dW, G_k>` as `[K]` float64 where `need_dots`, else None.

    Args:
        buffers: per gene its accumulator, contiguous, in the genes' shape and the work dtype, or None.
        dy: `[B, O, H', W']`.
        x: `[B, C, H, W]`.
        genes: K tensors `[O, C/groups, kh, kw]`.
        coeffs: `[K]` in the work dtype.
        need_dots: whether the coefficients need a gradient.
        conv: stride, padding, dilation, groups.
    """
    flat = [None if buffer is None else buffer.view(buffer.shape[0], -1) for buffer in buffers]
    if _is_product(x, genes[0], conv):
        return _regimes.gene_gradients(flat, _pixels(dy), _pixels(x), _matrices(genes), coeffs, need_dots)
    total = torch.zeros(len(genes), dtype=torch.float64, device=x.device) if need_dots else None
    if _rows.gene_gradients(buffers, dy, x, genes, coeffs, total, conv):
        return total
    element, per_row = _copies(x) * x.element_size(), 8 * len(genes)
    shape, device = genes[0].shape, x.device.type
    for panel in panels(shape, conv.groups, element, by_output=True, per_row=per_row, device=device):
        size = (panel.rows.stop - panel.rows.start, *shape[1:])
        (_, part, _) = _backward(
            dy[:, panel.rows], x[:, panel.channels], x.new_empty(1).expand(size), None,
            conv.stride, conv.padding, conv.dilation, False, (0, 0), panel.groups, (False, True, False),
        )  # fmt: skip
        part = part.contiguous().view(size[0], -1)
        dots = total.new_empty((size[0], len(genes))) if total is not None else None
        rows = [None if buffer is None else buffer[panel.rows] for buffer in flat]
        _accumulate(part, [gene[panel.rows] for gene in genes], coeffs, rows, dots)
        if total is not None and dots is not None:
            total += dots.sum(0)
        del part  # the next panel is made in its place
    return total


def _copies(x: Tensor) -> int:
    """By how much panels of dW are smaller: beside each the vendor holds its own copies, on the CPU one per thread."""
    return 2 if x.device.type != "cpu" else 1 + torch.get_num_threads()


def panels(
    weight: Sequence[int], groups: int, element: int, *, by_output: bool, per_row: int = 0, device: str = "cpu"
) -> Iterator[Panel]:
    """Cut a weight `[O, C/groups, kh, kw]` into panels of at most the device's panel bytes, or of one channel.

    Args:
        weight: its shape.
        groups: of the convolution; a panel covers whole groups, or a part of one.
        element: bytes that an element takes.
        by_output: cut a group by output channels, else by input channels.
        per_row: bytes that one output channel takes at least.
        device: type of the device.
    """
    outer, inner = weight[0] // groups, weight[1]
    line = max(inner * weight[2] * weight[3] * element, per_row)
    if groups > 1 and plan.panel_length(line, 1, outer, device) == outer:
        length = plan.panel_length(outer * line, 1, groups, device)
        for start in range(0, groups, length):
            end = min(groups, start + length)
            channels = slice(start * inner, end * inner)
            yield Panel(slice(start * outer, end * outer), slice(0, inner), channels, end - start)
        return
    limit = outer if by_output else inner
    length = plan.panel_length(line if by_output else outer * weight[2] * weight[3] * element, 1, limit, device)
    if BLOCK < length < limit:
        length -= length % BLOCK
    for group in range(groups):
        row, channel = group * outer, group * inner
        for start in range(0, limit, length):
            end = min(limit, start + length)
            if by_output:
                yield Panel(slice(row + start, row + end), slice(0, inner), slice(channel, channel + inner), 1)
            else:
                channels = slice(channel + start, channel + end)
                yield Panel(slice(row, row + outer), slice(start, end), channels, 1)


def _synthesized(
    like: Tensor, genes: Sequence[Tensor], coeffs: Tensor, groups: int, *, by_output: bool
) -> Iterator[tuple[Panel, Tensor]]:
    """The panels with their weights in the dtype of `like`; each weight lives until the next one is made."""
    element, device = like.element_size(), like.device.type
    cut = list(panels(genes[0].shape, groups, element, by_output=by_output, device=device))
    kernel = genes[0].shape[2:]
    shapes = [(p.rows.stop - p.rows.start, p.inner.stop - p.inner.start, *kernel) for p in cut]
    workspace = like.new_empty(max(rows * inner for rows, inner, *_ in shapes) * kernel.numel())
    for panel, shape in zip(cut, shapes, strict=True):
        weight = workspace[: shape[0] * shape[1] * kernel.numel()].view(shape)
        _fill(weight.view(shape[0], -1), [gene[panel.rows, panel.inner] for gene in genes], coeffs)
        yield panel, weight


def _fill(out: Tensor, windows: Sequence[Tensor], coeffs: Tensor) -> None:
    """`out = sum_k c_k G_k`: windows `[R, C, kh, kw]` of the genes -> out `[R, C * kh * kw]`."""
    for rows in _stretches(windows):
        fill(out[rows], [window[rows].flatten(1) for window in windows], coeffs)


def _accumulate(
    part: Tensor, windows: Sequence[Tensor], coeffs: Tensor, buffers: Sequence[Tensor | None], dots: Tensor | None
) -> None:
    """`accumulate` of dW `[R, C * kh * kw]` on windows `[R, C, kh, kw]` of the genes and rows of their buffers."""
    for rows in _stretches(windows):
        sums = [None if buffer is None else buffer[rows] for buffer in buffers]
        row_dots = None if dots is None else dots[rows]
        # Copies that no name holds are freed before those of the next rows are made.
        accumulate(part[rows], [window[rows].flatten(1) for window in windows], coeffs, sums, 0, row_dots)


def _stretches(windows: Sequence[Tensor]) -> Iterator[slice]:
    """Rows to be read at once: all of windows that are matrices as they lie, else a panel of copies, or one row."""
    first, rows = windows[0], windows[0].shape[0]
    copied = sum(not _is_matrix(window) for window in windows)
    line = copied * first[0].numel()
    length = plan.panel_length(line, first.element_size(), rows, first.device.type) if copied else rows
    for start in range(0, rows, length):
        yield slice(start, min(rows, start + length))


def _is_matrix(window: Tensor) -> bool:
    """Whether `[R, C, kh, kw]` is `[R, C * kh * kw]` as it lies."""
    axes = [(size, step) for size, step in zip(window.shape[1:], window.stride()[1:], strict=True) if size > 1]
    return all(step == size * inner for (_, step), (size, inner) in pairwise(axes))


def _placed(whole: Tensor | None, part: Tensor, channels: slice, size: Sequence[int], like: Tensor) -> Tensor:
    """Put a panel's result into the whole, which is made at the first; a single panel is the whole."""
    if part.shape[1] == size[1]:
        return part.contiguous(memory_format=_rows.memory_format(like))
    if whole is None:
        whole = _rows.empty_like(like, size)
    whole[:, channels].copy_(part)
    return whole


def _is_product(image: Tensor, gene: Tensor, conv: Conv2d) -> bool:
    """Whether this is a 1x1 convolution on pixels that are rows of a matrix as they lie."""
    plain = conv.groups == 1 and tuple(gene.shape[2:]) == (1, 1)
    plain = plain and tuple(conv.stride) == (1, 1) and tuple(conv.padding) == (0, 0)
    return plain and (_rows.channels_last(image) or image.shape[2] * image.shape[3] == 1)


def _pixels(image: Tensor) -> Tensor:
    """`[B, C, H, W]` -> `[B * H * W, C]`."""
    return image.permute(0, 2, 3, 1).flatten(0, 2)


def _image(pixels: Tensor, size: Sequence[int], like: Tensor) -> Tensor:
    """`[B * H * W, C]` -> `size` `[B, C, H, W]`, in the memory format of `like`."""
    batch, channels, height, width = size
    if _rows.channels_last(like):
        return pixels.view(batch, height, width, channels).permute(0, 3, 1, 2)
    return pixels.view(batch, channels, height, width)


def _matrices(genes: Sequence[Tensor]) -> list[Tensor]:
    return [gene.flatten(1) for gene in genes]
