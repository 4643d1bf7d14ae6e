# SPDX-License-Identifier: Apache-2.0
"""Types of the optional compiled module for CUDA: one class per submodule, one submodule per primitive."""

version: str
runtime: int

def devices() -> tuple[int, str]: ...

class expansion:
    most_genes: int
    most_tokens: int
    @staticmethod
    def takes(x_dtype: int, gene_dtype: int) -> bool: ...
    @staticmethod
    def rows_forward(
        device: int,
        stream: int,
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
        bias_genes: list[tuple[int, int]],
        bias_dtype: int,
    ) -> None: ...
