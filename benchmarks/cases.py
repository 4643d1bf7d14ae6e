# SPDX-License-Identifier: Apache-2.0
"""What a case of a benchmark declares, and the check that comes before any timing.

How calls are timed is in `timing`, which calls there are is in the file of each primitive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# One set of inputs -> named results. Calls may be generators, so that results need not be held together.
Call = Callable[[Any], Iterable[tuple[str, Tensor]]]
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
# Of the largest element: fp32 sums of a few thousand terms; bf16 a few roundings of 2^-9 along one layer.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


class WrongResultError(AssertionError):
    """A call of a case does not compute what the float64 reference computes, so its speed means nothing."""


@dataclass(frozen=True)
class Case:
    """One measurement: a call of ours against baselines that compute the same.

    Attributes:
        stem: of the primitive.
        kind: "synthesis" (the weight alone), "forward" (no gradients), "dx" and "wgrad" (the products of a backward
            pass alone), "training" (forward and backward of blocks), "model" (a whole network; the calls turn
            gradients on themselves) or "host" (what a tiny call costs around its product; likewise).
        regime: which regime of the plan our call takes.
        shape: what is computed, for people: sizes without M, K and dtype.
        tokens: M; 0 for synthesis.
        genes: K.
        dtype: of x and the weights.
        make: returns one set of inputs, always with the same values.
        ours: the call that is measured.
        reference: the same in float64; its names are those that `ours` has to give.
        baselines: by name; each gives at least one of the reference's names.
        roof: a copy of as many bytes as synthesis has to move, or None; not compared.
        moved: bytes that synthesis has to read and write, 0 for the other kinds.
        weights: elements of the synthesized weight, likewise.
        tolerance: largest error allowed, as a share of the largest element of the reference.
        repeats: how often a call does the same; times are given per repeat.
        one_set: whether all calls of all rounds work on one set of inputs: a network whose weights are larger than the
            caches leaves nothing in them anyway, and a smaller one finds its weights there as it would elsewhere.
        between: the call that is run, untimed, ahead of each of the others, so that all of them find in the caches what
            it leaves there and none what another has read.
        sampled: whether the reference gives only some of the results, and the others are not compared.
        check_on: makes smaller inputs for the check, where those that are timed are too large for it.
    """

    stem: str
    kind: str
    regime: str
    shape: str
    tokens: int
    genes: int
    dtype: torch.dtype
    make: Callable[[], Any]
    ours: Call
    reference: Call
    baselines: Mapping[str, Call] = field(default_factory=dict)
    roof: Call | None = None
    moved: int = 0
    weights: int = 0
    tolerance: float = 0.0
    repeats: int = 1
    one_set: bool = False
    between: str = ""
    sampled: bool = False
    check_on: Callable[[], Any] | None = None

    @property
    def name(self) -> str:
        """What the command line and pytest call it."""
        tokens = f"-M{self.tokens}" if self.tokens else ""
        shape = self.shape.replace(" ", "")
        return f"{self.stem}-{self.kind}-{shape}{tokens}-K{self.genes}-{SHORT[self.dtype]}"

    def calls(self) -> dict[str, Call]:
        """Everything that is timed, ours first."""
        roof = {} if self.roof is None else {"copy": self.roof}
        return {"ours": self.ours, **self.baselines, **roof}

    def run(self, call: Call, inputs: Any) -> None:
        """Run a call as it is timed: each result is dropped when the next is there."""
        with torch.set_grad_enabled(self.kind == "training"):
            for _ in call(inputs):
                pass

    def check(self, inputs: Any) -> None:
        """Compare ours and every baseline with the reference.

        Raises:
            WrongResultError: a result is missing, has another shape, or differs by more than the tolerance.
        """
        with torch.set_grad_enabled(self.kind == "training"):
            expected = {name: value.detach() for name, value in self.reference(inputs)}
            for call, function in {"ours": self.ours, **self.baselines}.items():
                # Copied, since gradients live in the inputs and the next call replaces them.
                got = {
                    name: value.detach().double()
                    for name, value in function(inputs)
                    if name in expected or not self.sampled
                }
                missing = set(expected) - set(got) if call == "ours" else set()
                if missing or not got or not set(got) <= set(expected):
                    raise WrongResultError(f"{self.name}, {call}: expected {sorted(expected)}, got {sorted(got)}")
                for name, value in got.items():
                    self._compare(f"{self.name}, {call}, {name}", value, expected[name])

    def _compare(self, what: str, got: Tensor, expected: Tensor) -> None:
        if got.shape != expected.shape:
            raise WrongResultError(f"{what}: expected shape {list(expected.shape)}, got {list(got.shape)}")
        error = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-300))
        tolerance = self.tolerance or TOLERANCES[self.dtype]
        if not error <= tolerance:  # so that NaN is refused too
            raise WrongResultError(f"{what}: expected an error of at most {tolerance:g} of the largest, got {error:g}")
