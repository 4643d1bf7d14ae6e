# SPDX-License-Identifier: Apache-2.0
"""Speed of the primitives, one file of cases per primitive, one runner for all; nothing here is installed.

`python -m benchmarks.run` measures, `pytest benchmarks` runs every case once. No speed is asserted anywhere.
"""
