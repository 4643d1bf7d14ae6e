# SPDX-License-Identifier: Apache-2.0
"""Plain text tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: set[int] | None = None) -> str:
    """Align columns with two spaces between them and a rule under the header.

    Args:
        header: one title per column.
        rows: cells as text.
        right: columns to align to the right.

    Example:
        >>> print(text_table(["depth", "accuracy"], [["2", ".75"], ["10", ".8"]], right={0}))
        depth  accuracy
        -----  --------
            2  .75
           10  .8
    """
    right = right or set()
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    rule = ["-" * width for width in widths]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    return "\n".join(line(cells) for cells in [header, rule, *rows])
