# SPDX-License-Identifier: Apache-2.0
"""The exception classes, each with the exit code of the command line.

Every class also derives from the builtin a caller would expect (`ValueError`, `TypeError`, ...).
This module imports nothing.
"""

from __future__ import annotations


class PylearngeneError(Exception):
    """Base of every error raised on purpose; `exit_code` is what the command line returns."""

    exit_code = 2


class ShapeError(PylearngeneError, ValueError):
    """A tensor has the wrong shape, or two tensors do not fit each other."""


class DTypeError(PylearngeneError, TypeError):
    """A tensor has a dtype that the operation does not take."""


class DeviceError(PylearngeneError, ValueError):
    """Tensors of one call are on different devices, or on one that is not supported."""


class ArgumentError(PylearngeneError, ValueError):
    """An option has a value outside what is allowed."""


class BackendError(PylearngeneError, RuntimeError):
    """A backend was asked for by name and cannot run here."""


DOUBLE_BACKWARD = (
    "double backward: expected one differentiation of a gene-backed layer, got a second one; "
    "its fused backward pass has no derivative (use pylearngene.reference for higher orders)"
)


class DoubleBackwardError(PylearngeneError, RuntimeError):
    """A second derivative was asked for; the fused backward passes have none."""


class HostError(PylearngeneError, ValueError):
    """A model has no repeated blocks, or blocks that cannot be gene-backed."""


class MethodError(PylearngeneError, ValueError):
    """A method was asked for something it cannot do (for instance to change the width)."""


class GeneFileError(PylearngeneError, ValueError):
    """A gene folder or data file is damaged, incomplete or of a newer format."""


class NonFiniteError(PylearngeneError, ValueError):
    """A stored tensor holds NaN or Inf."""

    exit_code = 3


class TooLargeError(PylearngeneError, ValueError):
    """A file or a request is larger than the stated limit."""

    exit_code = 4


class WriteError(PylearngeneError, OSError):
    """An output could not be written; what was there before is unchanged."""

    exit_code = 5


class BusyError(PylearngeneError, RuntimeError):
    """Another process is writing the same output."""

    exit_code = 6


class ShardingError(PylearngeneError, RuntimeError):
    """A model is wrapped for several processes in a way in which its genes cannot be trained."""


class ProcessError(PylearngeneError, RuntimeError):
    """Another process of a run failed, or the processes cannot work together."""

    exit_code = 1
