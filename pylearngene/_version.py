# SPDX-License-Identifier: Apache-2.0
"""The version of the package; the native module carries the one that it was built with, and both must agree."""

__version__ = "0.1.0"
