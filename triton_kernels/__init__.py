# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of pylearngene, one module per primitive.

This folder is installed as `pylearngene.triton_kernels`, never under its bare name, which belongs to another package.
Importing the package does not import Triton; its modules do, and import each other by the installed name.
"""
