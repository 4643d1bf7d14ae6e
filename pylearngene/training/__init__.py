# SPDX-License-Identifier: Apache-2.0
"""Training: distillation losses, the loop with resumable checkpoints, and measured memory."""
