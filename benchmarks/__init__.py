# SPDX-License-Identifier: Apache-2.0
"""Speed of the primitives, one file of cases per primitive, one runner for all; nothing here is installed.

`benchmarks/run.py` measures, `pytest benchmarks` runs every case once. No speed is asserted anywhere.
"""
