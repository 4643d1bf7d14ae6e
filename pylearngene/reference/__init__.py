# SPDX-License-Identifier: Apache-2.0
"""The specification: each primitive in short, plain PyTorch, differentiable by autograd.

Kernels, tests and benchmarks import this one copy. It builds full weights; nothing else in the package does.
"""
