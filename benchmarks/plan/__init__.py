# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.plan`: measures `rows` against `panel` on a CPU and generates the table that the plan reads.

`points` times one call in both regimes, `search` finds where they cross, `table` makes the file; `held_out` shows on
other shapes how good the choice is.
"""
