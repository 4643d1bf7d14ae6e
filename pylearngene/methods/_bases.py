# SPDX-License-Identifier: Apache-2.0
"""The bases in which LDR expands a network over its depth, at the positions `x = l / L`, `l` from 0.

Each function returns the first orders, from 0, at one position. Order 0 is the constant 1 in every basis. Which orders
a method uses is not decided here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Orders = list[float]


def chebyshev(count: int, index: int, depth: int) -> Orders:
    """Chebyshev polynomials of the first kind: 1, x, then `T_{n+1} = 2 x T_n - T_{n-1}`."""
    x = index / depth
    orders = [1.0, x]
    while len(orders) < count:
        orders.append(2 * x * orders[-1] - orders[-2])
    return orders[:count]


def taylor(count: int, index: int, depth: int) -> Orders:
    """Powers `x^n`, a Taylor series about 0 whose factors 1 / n! are part of the genes."""
    x = index / depth
    return [x**order for order in range(count)]


def legendre(count: int, index: int, depth: int) -> Orders:
    """Legendre polynomials of x, not shifted: 1, x, then `(n + 1) P_{n+1} = (2 n + 1) x P_n - n P_{n-1}`."""
    x = index / depth
    orders = [1.0, x]
    while len(orders) < count:
        n = len(orders) - 1
        orders.append(((2 * n + 1) * x * orders[n] - n * orders[n - 1]) / (n + 1))
    return orders[:count]


def fourier(count: int, index: int, depth: int) -> Orders:
    """The series of period 1: 1, cos 2 pi x, sin 2 pi x, cos 4 pi x, ..., on the grid the real discrete transform."""
    orders = [1.0]
    for order in range(1, count):
        wave = _cosine if order % 2 else _sine
        orders.append(wave((order + 1) // 2 * index % depth, depth))
    return orders


def _sine(part: int, whole: int) -> float:
    """sin(2 pi part / whole), exact at quarters of a turn."""
    return _cosine((4 * part - whole) % (4 * whole), 4 * whole)


def _cosine(part: int, whole: int) -> float:
    """cos(2 pi part / whole), exact at quarters of a turn."""
    quarter, rest = divmod(4 * part, whole)
    return (1.0, 0.0, -1.0, 0.0)[quarter] if rest == 0 else math.cos(2 * math.pi * part / whole)


BASES: dict[str, Callable[[int, int, int], Orders]] = {
    "chebyshev": chebyshev,
    "taylor": taylor,
    "fourier": fourier,
    "legendre": legendre,
}
