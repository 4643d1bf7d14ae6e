# SPDX-License-Identifier: Apache-2.0
"""What papers claim of their methods, tried on the demo's data: one study per method, each a program.

`python -m benchmarks.claims.tleg` (and `ldr`, `sws`) trains, then writes a CSV row per network and seed, a picture and
a page of tables. These are small networks on small images: they show mechanisms, not a paper's numbers.
"""
