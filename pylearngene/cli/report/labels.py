# SPDX-License-Identifier: Apache-2.0
"""How the arms of the demo and the kinds of memory measurement are called, in the order of the report."""

from __future__ import annotations

ARMS = {
    "untouched": "learngene, untouched",
    "tuned": "learngene, tuned",
    "picked": "ancestry layers, tuned",
    "scratch": "scratch, equal steps",
    "scratch_distilled": "scratch, distilled",
    "scratch_compute": "scratch, equal compute",
}
# what the tuned descendants are compared with: four baselines, and their own state before tuning
COMPARED = ("picked", "scratch", "scratch_distilled", "scratch_compute", "untouched")
MEMORY_KINDS = {
    "dense": "dense",
    "eager": "eager, weights kept by autograd",
    "recomputed": "eager, weights made again in the backward",
    "ours": "pylearngene",
}
