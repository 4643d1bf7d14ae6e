# SPDX-License-Identifier: Apache-2.0
"""Rows of x up to which `rows` is faster than `panel` on a CPU: written by `make plan`, not by hand.

Measured on AMD EPYC, 2 threads, with torch 2.13.0+cpu and pylearngene 0.1.0, commit 26464d4ee260. Levels below the
best one of that processor are what its libraries do when they are kept from better instructions.
"""

import sys

MEASURED_ON = "AMD EPYC, 2 threads"
ALWAYS = sys.maxsize
#: Each of the limits below is for so many genes and those above the number before it; the last for all above, too.
GENES = (1, 2, 4, 8, 12)
#: Instruction level -> dtype -> product -> limits.
ROWS_UP_TO = {
    "DEFAULT": {
        "fp32": {
            "y": (4, 4, 8, 8, 24),
            "dx": (4, 4, 0, 0, 0),
            "dw": (12, 12, 12, 12, 16),
        },
        "bf16": {
            "y": (ALWAYS, ALWAYS, ALWAYS, ALWAYS, ALWAYS),
            "dx": (ALWAYS, ALWAYS, ALWAYS, ALWAYS, ALWAYS),
            "dw": (ALWAYS, ALWAYS, ALWAYS, ALWAYS, ALWAYS),
        },
        "fp16": {
            "y": (ALWAYS, ALWAYS, ALWAYS, ALWAYS, ALWAYS),
            "dx": (ALWAYS, ALWAYS, ALWAYS, ALWAYS, ALWAYS),
            "dw": (ALWAYS, ALWAYS, ALWAYS, ALWAYS, ALWAYS),
        },
    },
    "AVX2": {
        "fp32": {
            "y": (ALWAYS, ALWAYS, ALWAYS, ALWAYS, ALWAYS),
            "dx": (64, 64, 0, 0, 0),
            "dw": (64, 64, 64, 64, 256),
        },
        "bf16": {
            "y": (ALWAYS, ALWAYS, ALWAYS, ALWAYS, ALWAYS),
            "dx": (ALWAYS, ALWAYS, ALWAYS, ALWAYS, ALWAYS),
            "dw": (ALWAYS, ALWAYS, ALWAYS, ALWAYS, ALWAYS),
        },
        "fp16": {
            "y": (ALWAYS, ALWAYS, ALWAYS, ALWAYS, ALWAYS),
            "dx": (ALWAYS, ALWAYS, ALWAYS, ALWAYS, ALWAYS),
            "dw": (ALWAYS, ALWAYS, ALWAYS, ALWAYS, ALWAYS),
        },
    },
    "AVX512": {
        "fp32": {
            "y": (ALWAYS, ALWAYS, ALWAYS, ALWAYS, ALWAYS),
            "dx": (ALWAYS, ALWAYS, 1024, 1024, 768),
            "dw": (ALWAYS, ALWAYS, ALWAYS, ALWAYS, ALWAYS),
        },
        "bf16": {
            "y": (ALWAYS, ALWAYS, ALWAYS, ALWAYS, ALWAYS),
            "dx": (ALWAYS, ALWAYS, ALWAYS, ALWAYS, ALWAYS),
            "dw": (ALWAYS, ALWAYS, ALWAYS, ALWAYS, ALWAYS),
        },
        "fp16": {
            "y": (ALWAYS, ALWAYS, ALWAYS, ALWAYS, ALWAYS),
            "dx": (ALWAYS, ALWAYS, ALWAYS, ALWAYS, ALWAYS),
            "dw": (ALWAYS, ALWAYS, ALWAYS, ALWAYS, ALWAYS),
        },
    },
    "AVX512_BF16": {
        "fp32": {
            "y": (ALWAYS, ALWAYS, ALWAYS, ALWAYS, ALWAYS),
            "dx": (ALWAYS, ALWAYS, ALWAYS, ALWAYS, 768),
            "dw": (ALWAYS, ALWAYS, ALWAYS, ALWAYS, ALWAYS),
        },
        "bf16": {
            "y": (ALWAYS, ALWAYS, ALWAYS, ALWAYS, ALWAYS),
            "dx": (ALWAYS, ALWAYS, ALWAYS, ALWAYS, 0),
            "dw": (ALWAYS, ALWAYS, ALWAYS, ALWAYS, ALWAYS),
        },
        "fp16": {
            "y": (ALWAYS, ALWAYS, ALWAYS, ALWAYS, ALWAYS),
            "dx": (ALWAYS, ALWAYS, ALWAYS, ALWAYS, ALWAYS),
            "dw": (ALWAYS, ALWAYS, ALWAYS, ALWAYS, ALWAYS),
        },
    },
}
#: Instruction level -> dtype -> TFLOP/s of `rows` and of `panel` with many tokens.
RATES = {
    "DEFAULT": {
        "fp32": (0.052, 0.14),
        "bf16": (0.047, 0.015),
        "fp16": (0.021, 0.0047),
    },
    "AVX2": {
        "fp32": (0.15, 0.18),
        "bf16": (0.12, 0.04),
        "fp16": (0.12, 0.0073),
    },
    "AVX512": {
        "fp32": (0.29, 0.16),
        "bf16": (0.29, 0.14),
        "fp16": (0.23, 0.0073),
    },
    "AVX512_BF16": {
        "fp32": (0.27, 0.16),
        "bf16": (0.79, 0.69),
        "fp16": (0.21, 0.0072),
    },
}
