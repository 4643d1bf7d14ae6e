# SPDX-License-Identifier: Apache-2.0
"""The GPU suite: stages that check and measure on one GPU, and with tiny sizes on the CPU; docs/gpu.md says how.

`python -m benchmarks.gpu STAGE...` runs stages with the pylearngene that Python imports; `benchmarks/gpu_suite.sh`
builds it first. No speed is asserted anywhere: goals are compared and printed.
"""
