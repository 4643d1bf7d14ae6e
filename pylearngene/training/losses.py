# SPDX-License-Identifier: Apache-2.0
"""The distillation loss of classifiers: soft, hard or none.

Feature and attention matching are not here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from pylearngene.errors import ArgumentError, ShapeError

KINDS = ("soft", "hard", "none")
KL_NORMS = ("batchmean", "numel")


@dataclass(frozen=True)
class DistillationLoss:
    """Mix of cross-entropy with the labels and agreement with a teacher.

    soft: (1 - alpha) * CE(z, y) + alpha * tau^2 * sum_bc p_t (log p_t - log p_s) / norm,  p = softmax(z / tau)
    hard: (1 - alpha) * CE(z, y) + alpha * CE(z, argmax z_teacher)
    none: CE(z, y)

    Args:
        alpha: share of the teacher, 0 to 1.
        tau: temperature of the soft loss, above 0.
        kind: "soft", "hard" or "none".
        kl_norm: norm is B for "batchmean" and B * C for "numel".

    Raises:
        ArgumentError: an option is outside what is listed, or the teacher's logits are missing at the call.
        ShapeError: logits, labels and the teacher's logits do not fit each other.

    Numerics: computed in float32 whatever the logits' dtype.

    Source: G. Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531, section 2;
    H. Touvron et al., "Training data-efficient image transformers", ICML 2021, arXiv 2012.12877, equations 2 and 3
    (whose code divides by B * C, and so does TLEG's).

    Example:
        >>> loss = DistillationLoss(alpha=1.0, tau=2.0)
        >>> z = torch.tensor([[1.0, 0.0]])
        >>> float(loss(z, torch.tensor([0]), z))
        0.0
    """

    alpha: float = 1.0
    tau: float = 1.0
    kind: str = "soft"
    kl_norm: str = "batchmean"

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ArgumentError(f"alpha: expected 0 to 1, got {self.alpha}")
        if not 0.0 < self.tau < float("inf"):
            raise ArgumentError(f"tau: expected a finite number above 0, got {self.tau}")
        if self.kind not in KINDS:
            raise ArgumentError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.kl_norm not in KL_NORMS:
            raise ArgumentError(f"kl_norm: expected one of {', '.join(KL_NORMS)}, got {self.kl_norm!r}")

    @property
    def needs_teacher(self) -> bool:
        """Whether a call needs the teacher's logits."""
        return self.kind != "none" and self.alpha > 0.0

    def __call__(self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None) -> Tensor:
        """Compute the loss of a batch: logits [B, C], labels int64 [B], teacher_logits [B, C]; returns a scalar."""
        self._check(logits, labels, teacher_logits)
        logits = logits.float()
        if not self.needs_teacher or teacher_logits is None:
            return F.cross_entropy(logits, labels)
        if self.kind == "hard":
            agreement = F.cross_entropy(logits, teacher_logits.argmax(dim=-1))
        else:
            agreement = self._divergence(logits, teacher_logits.float())
        if self.alpha == 1.0:
            return agreement
        return (1.0 - self.alpha) * F.cross_entropy(logits, labels) + self.alpha * agreement

    def _divergence(self, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        student = F.log_softmax(logits / self.tau, dim=-1)
        teacher = F.log_softmax(teacher_logits / self.tau, dim=-1)
        norm = logits.shape[0] if self.kl_norm == "batchmean" else logits.numel()
        return F.kl_div(student, teacher, reduction="sum", log_target=True) * (self.tau**2 / norm)

    def _check(self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None) -> None:
        if logits.ndim != 2:
            raise ShapeError(f"logits: expected [B, C], got {list(logits.shape)}")
        if labels.shape != logits.shape[:1]:
            raise ShapeError(f"labels: expected [{logits.shape[0]}], got {list(labels.shape)}")
        if self.needs_teacher and teacher_logits is None:
            raise ArgumentError(f"teacher_logits: expected a tensor for kind={self.kind!r}, got None")
        if teacher_logits is not None and teacher_logits.shape != logits.shape:
            raise ShapeError(f"teacher_logits: expected {list(logits.shape)}, got {list(teacher_logits.shape)}")
