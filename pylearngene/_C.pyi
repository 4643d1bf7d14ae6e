# SPDX-License-Identifier: Apache-2.0
"""Types of the compiled module: one class per submodule, one submodule per primitive."""

from torch import Tensor

version: str

def levels() -> list[str]: ...
def supported_levels() -> list[str]: ...

class expansion:
    @staticmethod
    def synthesize(
        level: int,
        threads: int,
        dst: int,
        dst_dtype: int,
        rows: int,
        cols: int,
        dst_row_stride: int,
        genes: list[tuple[int, int, int]],
        gene_dtype: int,
        coeffs: int,
    ) -> None: ...
    @staticmethod
    def synthesize_stack(
        level: int,
        threads: int,
        dst: list[tuple[int, int]],
        dst_dtype: int,
        rows: int,
        cols: int,
        add: bool,
        genes: list[tuple[int, int, int]],
        gene_dtype: int,
        coeffs: int,
    ) -> None: ...
    @staticmethod
    def rows_forward(
        level: int,
        threads: int,
        y: int,
        x: int,
        x_dtype: int,
        M: int,
        I: int,
        O: int,
        x_row_stride: int,
        y_row_stride: int,
        genes: list[tuple[int, int, int]],
        gene_dtype: int,
        coeffs: int,
        bias: int,
        bias_genes: list[tuple[int, int, int]],
        bias_dtype: int,
    ) -> None: ...
    @staticmethod
    def rows_dx(
        level: int,
        threads: int,
        dx: int,
        dy: int,
        dy_dtype: int,
        M: int,
        I: int,
        O: int,
        dy_row_stride: int,
        dx_row_stride: int,
        genes: list[tuple[int, int, int]],
        gene_dtype: int,
        coeffs: int,
    ) -> None: ...
    @staticmethod
    def accumulate(
        level: int,
        threads: int,
        dw: int,
        dw_dtype: int,
        rows: int,
        cols: int,
        dw_row_stride: int,
        genes: list[tuple[int, int, int]],
        gene_dtype: int,
        coeffs: int,
        buffers: list[tuple[int, int]],
        dots: int,
    ) -> None: ...
    @staticmethod
    def rows_wgrad(
        level: int,
        threads: int,
        dy: int,
        x: int,
        x_dtype: int,
        M: int,
        I: int,
        O: int,
        dy_row_stride: int,
        x_row_stride: int,
        genes: list[tuple[int, int, int]],
        gene_dtype: int,
        coeffs: int,
        buffers: list[tuple[int, int]],
        dots: int,
    ) -> None: ...
    @staticmethod
    def column_sums(
        level: int, threads: int, sums: int, dy: int, dy_dtype: int, M: int, O: int, dy_row_stride: int
    ) -> None: ...

    class Calls:
        def __init__(self, threads_pay_from: int, exchange: object, classes: tuple[type, ...]) -> None: ...
        def forward(
            self,
            level: int,
            threads: int,
            most: int,
            x: object,
            genes: object,
            coeffs: object,
            bias: object,
            bias_genes: object,
        ) -> Tensor | None: ...
        def input_gradient(
            self, level: int, threads: int, most: int, dy: object, genes: object, coeffs: object
        ) -> Tensor | None: ...
        def gradients(
            self,
            level: int,
            threads: int,
            most: int,
            dy: object,
            x: object,
            genes: object,
            coeffs: object,
            places: object,
            bias_genes: object,
            bias_places: object,
            sums: object,
            need_dx: bool,
        ) -> Tensor | bool | None: ...
        def weight(self, level: int, threads: int, genes: object, coeffs: object) -> Tensor | None: ...

class expansion_conv:
    @staticmethod
    def room(
        level: int,
        threads: int,
        dtype: int,
        channels: int,
        n: int,
        taps: int,
        tokens: int,
        gradients: bool,
    ) -> int: ...

    class Calls:
        def __init__(self, threads_pay_from: int, exchange: object, classes: tuple[type, ...]) -> None: ...
        def product(
            self,
            level: int,
            threads: int,
            y: object,
            x: object,
            genes: object,
            coeffs: object,
            bias: object,
            steps: tuple[int, ...],
            transposed: bool,
        ) -> bool: ...
        def gradients(
            self,
            level: int,
            threads: int,
            dy: object,
            x: object,
            genes: object,
            coeffs: object,
            buffers: object,
            dots: object,
            steps: tuple[int, ...],
        ) -> bool: ...

class expansion_norm:
    @staticmethod
    def workspace(tokens: int, columns: int, itemsize: int) -> int: ...

    class Calls:
        def __init__(
            self, threads_pay_from: int, exchange: object, classes: tuple[type, ...], kind: int = 0
        ) -> None: ...
        def forward(
            self,
            level: int,
            threads: int,
            x: object,
            gains: object,
            biases: object,
            coeffs: object,
            eps: float,
            keep: bool,
        ) -> Tensor | tuple[Tensor, Tensor] | None: ...
        def backward(
            self,
            level: int,
            threads: int,
            dy: object,
            x: object,
            moments: object,
            gains: object,
            biases: object,
            coeffs: object,
            buffers: object,
            bias_buffers: object,
            need_dx: bool,
            need_dots: bool,
        ) -> tuple[Tensor | None, Tensor | None] | None: ...
