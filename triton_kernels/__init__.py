# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of pylearngene, one module per primitive.

This folder is installed as `pylearngene.triton_kernels`, never under its bare name, which belongs to another package.
It holds no kernel yet. Modules in it use relative imports only.
"""
