# SPDX-License-Identifier: Apache-2.0
"""Rows of x up to which `rows` is faster than `panel` on a CPU: written by `make plan`, not by hand.

Measured on AMD EPYC, 2 threads, with torch 2.13.0+cpu and pylearngene 0.1.0, commit 8dc0401da7b1+, 0d9699bd184d+,
de8023ef2fc1+. Levels below the best one of that processor are what its libraries do when they are kept from better
instructions.
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
            "y": (8, 8, 8, 8, 0),
            "dx": (2, 2, 0, 0, 0),
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
            "y": (ALWAYS, ALWAYS, ALWAYS, 192, 0),
            "dx": (256, 192, 0, 0, 0),
            "dw": (64, 64, 1024, 1024, 256),
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
            "dx": (ALWAYS, ALWAYS, ALWAYS, ALWAYS, ALWAYS),
            "dw": (ALWAYS, ALWAYS, 384, ALWAYS, ALWAYS),
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
        "fp32": (0.055, 0.15),
        "bf16": (0.049, 0.016),
        "fp16": (0.023, 0.0049),
    },
    "AVX2": {
        "fp32": (0.15, 0.18),
        "bf16": (0.14, 0.042),
        "fp16": (0.12, 0.0077),
    },
    "AVX512": {
        "fp32": (0.28, 0.17),
        "bf16": (0.23, 0.15),
        "fp16": (0.19, 0.0075),
    },
    "AVX512_BF16": {
        "fp32": (0.29, 0.18),
        "bf16": (0.86, 0.73),
        "fp16": (0.21, 0.0076),
    },
}
