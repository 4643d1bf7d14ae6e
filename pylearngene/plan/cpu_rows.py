# SPDX-License-Identifier: Apache-2.0
"""Rows of x up to which `rows` is faster than `panel` on a CPU: written by `make plan`, not by hand.

Measured on AMD EPYC, 2 threads, with torch 2.13.0+cpu and pylearngene 0.1.0, commit b76ff08. Levels below the best
one of that processor are what its libraries do when they are kept from better instructions.
"""

import sys

MEASURED_ON = "AMD EPYC, 2 threads"
ALWAYS = sys.maxsize
#: Each of the limits below is for so many genes and those above the number before it; the last for all above, too.
GENES = (1, 2, 4, 8)
#: Instruction level -> dtype -> product -> limits.
ROWS_UP_TO = {
    "DEFAULT": {
        "fp32": {
            "y": (16, 16, 16, 16),
            "dx": (16, 16, 16, 16),
            "dw": (16, 16, 16, 16),
        },
        "bf16": {
            "y": (16, 16, 16, 16),
            "dx": (16, 16, 16, 16),
            "dw": (16, 16, 16, 16),
        },
        "fp16": {
            "y": (16, 16, 16, 16),
            "dx": (16, 16, 16, 16),
            "dw": (16, 16, 16, 16),
        },
    },
    "AVX2": {
        "fp32": {
            "y": (16, 16, 16, 16),
            "dx": (16, 16, 16, 16),
            "dw": (32, 32, 32, 32),
        },
        "bf16": {
            "y": (ALWAYS, ALWAYS, ALWAYS, ALWAYS),
            "dx": (ALWAYS, ALWAYS, ALWAYS, ALWAYS),
            "dw": (ALWAYS, ALWAYS, ALWAYS, ALWAYS),
        },
        "fp16": {
            "y": (ALWAYS, ALWAYS, ALWAYS, ALWAYS),
            "dx": (ALWAYS, ALWAYS, ALWAYS, ALWAYS),
            "dw": (ALWAYS, ALWAYS, ALWAYS, ALWAYS),
        },
    },
    "AVX512": {
        "fp32": {
            "y": (ALWAYS, ALWAYS, ALWAYS, ALWAYS),
            "dx": (ALWAYS, ALWAYS, ALWAYS, ALWAYS),
            "dw": (ALWAYS, ALWAYS, ALWAYS, ALWAYS),
        },
        "bf16": {
            "y": (ALWAYS, ALWAYS, ALWAYS, ALWAYS),
            "dx": (ALWAYS, ALWAYS, ALWAYS, ALWAYS),
            "dw": (ALWAYS, ALWAYS, ALWAYS, ALWAYS),
        },
        "fp16": {
            "y": (ALWAYS, ALWAYS, ALWAYS, ALWAYS),
            "dx": (ALWAYS, ALWAYS, ALWAYS, ALWAYS),
            "dw": (ALWAYS, ALWAYS, ALWAYS, ALWAYS),
        },
    },
    "AVX512_BF16": {
        "fp32": {
            "y": (ALWAYS, ALWAYS, ALWAYS, ALWAYS),
            "dx": (ALWAYS, ALWAYS, ALWAYS, ALWAYS),
            "dw": (ALWAYS, ALWAYS, ALWAYS, ALWAYS),
        },
        "bf16": {
            "y": (32, 32, 32, 32),
            "dx": (4, 4, 4, 4),
            "dw": (128, 128, 128, 128),
        },
        "fp16": {
            "y": (ALWAYS, ALWAYS, ALWAYS, ALWAYS),
            "dx": (ALWAYS, ALWAYS, ALWAYS, ALWAYS),
            "dw": (ALWAYS, ALWAYS, ALWAYS, ALWAYS),
        },
    },
}
#: Instruction level -> dtype -> TFLOP/s of `rows` and of `panel` with many tokens.
RATES = {
    "DEFAULT": {
        "fp32": (0.05, 0.06),
        "bf16": (0.05, 0.03),
        "fp16": (0.05, 0.03),
    },
    "AVX2": {
        "fp32": (0.15, 0.18),
        "bf16": (0.15, 0.02),
        "fp16": (0.15, 0.02),
    },
    "AVX512": {
        "fp32": (0.33, 0.19),
        "bf16": (0.33, 0.02),
        "fp16": (0.3, 0.02),
    },
    "AVX512_BF16": {
        "fp32": (0.33, 0.19),
        "bf16": (0.5, 0.8),
        "fp16": (0.3, 0.02),
    },
}
