# SPDX-License-Identifier: Apache-2.0
"""`GeneBank`: the one owner of all genes of a network, and `GeneGroup`, the genes of one layer position.

Layers hold an unregistered reference and call the bank, so each gene is one Parameter with one state-dict key. The
bank keeps no synthesized weight; what it keeps between calls (taps, low-precision copies of genes) is dropped when it
is copied or pickled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pylearngene import _checks
from pylearngene._ops.expansion import accumulator
from pylearngene._ops.expansion_products import Conv2d
from pylearngene.errors import ArgumentError, ShapeError
from pylearngene.functional import _expansion_calls as _calls
from pylearngene.functional._expansion_conv import check_image, convolve
from pylearngene.functional._tap import Tap, key
from pylearngene.functional.expansion import MAX_GENES, check_coeffs, check_pair
from pylearngene.nn._pass import Pass, exporting, gene_backed_class, graph_id, plain_class

POLICIES = ("auto", "param")


class GeneGroup(nn.Module):
    """The K genes of one layer position: weights, and biases where the layer has one.

    Args:
        num_genes: K.
        weight_shape: `[O, I]`, `[O, C/groups, kh, kw]` for a convolution, or `[N]` for a norm.
        bias_shape: `[O]`, or None.
        device, dtype: of the genes.

    Attributes:
        weight: K Parameters.
        bias: K Parameters, or None.
    """

    def __init__(
        self,
        num_genes: int,
        weight_shape: Sequence[int],
        bias_shape: Sequence[int] | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()

        def parameters(shape: Sequence[int]) -> nn.ParameterList:
            return nn.ParameterList(
                nn.Parameter(torch.empty(tuple(shape), device=device, dtype=dtype)) for _ in range(num_genes)
            )

        self.num_genes = num_genes
        self.weight = parameters(weight_shape)
        self.bias = None if bias_shape is None else parameters(bias_shape)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each gene like a fresh layer's: uniform for products; ones then zeros, and zeros, for a norm."""
        for k, gene in enumerate(self.weight):
            if gene.dim() == 1:
                nn.init.constant_(gene, 1.0 if k == 0 else 0.0)
            elif gene.numel():
                nn.init.kaiming_uniform_(gene, a=math.sqrt(5))
        fan_in = math.prod(self.weight[0].shape[1:]) if self.weight[0].dim() > 1 else 0
        for gene in self.bias or ():
            bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
            nn.init.uniform_(gene, -bound, bound)

    def weights(self) -> list[Tensor]:
        """The weight genes in order (quicker than iterating over the ParameterList)."""
        return _in_order(self.weight, self.num_genes)

    def biases(self) -> list[Tensor]:
        """The bias genes; none where the layer has no bias."""
        return [] if self.bias is None else _in_order(self.bias, self.num_genes)

    def tensors(self) -> list[Tensor]:
        """All genes, weights first."""
        return self.weights() + self.biases()

    def extra_repr(self) -> str:
        """Number and shape of the genes, in one line."""
        shape = "x".join(str(n) for n in self.weight[0].shape)
        return f"{self.num_genes} genes of {shape}{'' if self.bias is None else ' with bias'}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


class GeneBank(nn.Module):
    """Owns the genes of a network, and applies them for its layers.

    `W[l] = sum_k c[l, k] G_k` for every layer that calls it. Each gene gets one ordinary gradient per backward pass,
    summed in float32 over all layers. Register the bank once, at the root, with `attach`.

    Args:
        compute_dtype: what layers read when x is bfloat16 or float16 and genes are float32. `"auto"`: one copy of each
            gene in x's dtype, per forward pass. `"param"`: the float32 genes themselves (exact where genes
            cancel, K times more bytes to read). Or a dtype, for copies in it.

    Attributes:
        genes: the tree of groups; a gene's state-dict key is `genes.<layer>.<weight|bias>.<k>`.
        method, host: the recipe and host description this network follows; set by `plg.auxiliary` and `descend`.

    Raises:
        ArgumentError: `compute_dtype` is neither of these.

    Example:
        >>> import torch, pylearngene as plg
        >>> bank = plg.nn.GeneBank()
        >>> layers = [plg.nn.ExpansionLinear(4, 3, bank=bank, name="fc", coeffs=[1.0, l / 6]) for l in range(6)]
        >>> layers[5](torch.ones(2, 4)).shape, len(list(bank.parameters()))
        (torch.Size([2, 3]), 4)
    """

    def __init__(self, compute_dtype: str | torch.dtype = "auto") -> None:
        super().__init__()
        allowed = (*POLICIES, *_checks.HALF, torch.float32)
        if compute_dtype not in allowed:
            raise ArgumentError(
                f"compute_dtype: expected 'auto', 'param', float32, bfloat16 or float16, got {compute_dtype!r}"
            )
        self.compute_dtype = compute_dtype
        self.genes = nn.Module()
        self.method: Any = None
        self.host: Any = None
        self._groups: dict[str, GeneGroup] = {}
        self._forget()

    def _forget(self) -> None:
        """Drop what is kept between calls; it refers to genes that may be about to change."""
        self._taps: dict[str, Tap] = {}
        self._pass: Pass | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_taps": {}, "_pass": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._forget()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def attach(self, model: nn.Module) -> None:
        """Register this bank as `model.gene_bank`, and mark where the model's forward passes begin and end.

        The model gets a subclass of its class, of the same name, whose forward does that. Layers work without it too;
        then low-precision copies are made per call, and compiled graphs return one gradient per layer.

        Args:
            model: the root model of the layers that use this bank.

        Raises:
            ArgumentError: the model has another bank already, or is a container that would call the bank as a layer.
        """
        if isinstance(model, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            raise ArgumentError(f"model: expected a module of your own around the layers, got {type(model).__name__}")
        other = getattr(model, "gene_bank", self)
        if other is not self:
            raise ArgumentError("model: expected a model without a gene bank, got one that has its own")
        model.gene_bank = self
        model.__class__ = gene_backed_class(plain_class(model))

    def detach(self, model: nn.Module) -> None:
        """Undo `attach`: the model has its own class again, and no bank.

        Args:
            model: a model that this bank is attached to.

        Raises:
            ArgumentError: it is not.
        """
        if getattr(model, "gene_bank", None) is not self:
            raise ArgumentError("model: expected the model this bank is attached to, got another")
        del model.gene_bank
        model.__class__ = plain_class(model)

    def add_group(
        self,
        name: str,
        num_genes: int,
        weight_shape: Sequence[int],
        *,
        bias_shape: Sequence[int] | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> GeneGroup:
        """The group called `name`, made at the first call and shared at every later one.

        Args:
            name: path of the layer inside its block, like `"attn.qkv"`.
            num_genes: K.
            weight_shape: `[O, I]`, `[O, C/groups, kh, kw]` for a convolution, or `[N]` for a norm.
            bias_shape: `[O]`, or None.
            device: of new genes.
            dtype: of new genes.

        Raises:
            ArgumentError: the name is empty or not usable, or K is not in 1..64.
            ShapeError: the group exists with another K or other shapes.
        """
        wanted = (num_genes, tuple(weight_shape), None if bias_shape is None else tuple(bias_shape))
        if name in self._groups:
            have = _signature(self._groups[name])
            if have != wanted:
                raise ShapeError(f"{name}: expected (genes, weight, bias) = {have} as in the bank, got {wanted}")
            return self._groups[name]
        _check_count(num_genes, 1)
        group = GeneGroup(*wanted, device, dtype)
        _plant(self.genes, name, group)
        self._groups[name] = group
        return group

    def grow_group(self, name: str, num_genes: int) -> GeneGroup:
        """The group called `name`, with genes of zeros after those it has, so that there are `num_genes`.

        The layers of the group need as many coefficients: `layer.set_coeffs`.

        Args:
            name: the group.
            num_genes: K from now on, at least as many as there are.

        Raises:
            ArgumentError: there is no such group, or K is no int, below what it has or above 64.
        """
        group = self.group(name)
        _check_count(num_genes, group.num_genes)
        self._forget()
        with torch.inference_mode(False):  # a caller who trains nothing now may train them later
            for genes in (group.weight, group.bias):
                if genes is not None:
                    genes.extend(nn.Parameter(torch.zeros_like(genes[0])) for _ in range(num_genes - group.num_genes))
        group.num_genes = num_genes
        return group

    def group(self, name: str) -> GeneGroup:
        """The group called `name`.

        Raises:
            ArgumentError: there is none; the message lists what there is.
        """
        if name not in self._groups:
            raise ArgumentError(f"name: expected one of {sorted(self._groups)}, got {name!r}")
        return self._groups[name]

    @property
    def groups(self) -> dict[str, GeneGroup]:
        """All groups by name, in the order they were added."""
        return dict(self._groups)

    def named_genes(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every gene with its key, like `("attn.qkv.weight.0", Parameter)`."""
        for name, group in self._groups.items():
            for part, genes in (("weight", group.weight), ("bias", group.bias or ())):
                for k, gene in enumerate(genes):
                    yield f"{name}.{part}.{k}", gene

    def reset_parameters(self) -> None:
        """Fresh values for every gene (after `to_empty`, for instance)."""
        for group in self._groups.values():
            group.reset_parameters()

    def forward(
        self,
        name: str,
        coeffs: Tensor,
        x: Tensor | None = None,
        part: str = "both",
        conv: Conv2d | None = None,
        used: slice | None = None,
    ) -> Any:
        """Apply a group to x, or expand its tensors.

        Args:
            name: the group.
            coeffs: `[K]`.
            x: `[*, I]`, for a convolution `[B, C, H, W]` or `[C, H, W]`; None asks for the expanded tensors instead.
            part: which of them: "weight", "bias" or "both".
            conv: settings of a convolution, for genes `[O, C/groups, kh, kw]`.
            used: the genes to read, where all others have coefficient 0; None for all. All are read where nothing
                else would tell autograd of the others.

        Returns:
            `[*, O]`, or the image; or the weight, the bias (None where there is none), or the pair of them.

        Raises:
            ArgumentError: there is no such group or part.
            DTypeError: x is not a plain floating tensor, or float64 is mixed with another dtype.
            ShapeError: x does not have I columns or C channels, is smaller than the kernel, or coeffs is not `[K]`.
            DeviceError: x or the coefficients are not where the genes are.
        """
        group = self.group(name)
        weights = group.weights()
        first = weights[0]
        check_coeffs(coeffs, weights)
        if x is None:
            return self._expand(name, group, coeffs, part, used)
        _checks.tensor(x, "x")
        _checks.floating(x, "x")
        if conv is None:
            _checks.last_dim(x, "x", first.shape[1], "I")
        else:
            check_image(x, first.shape, conv)
        _checks.same_device(x, "x", first, "the genes")
        x = _calls.autocast(x)
        check_pair(x, first)
        tap = self._tap(name, group)
        weights, biases = self._readable(name, weights, x.dtype, tap), group.biases()
        if used is not None and _may_choose(group, tap):
            weights, biases, coeffs, tap = weights[used], biases[used], coeffs[used], tap and tap.part(used)
        if conv is None:
            return _calls.linear(x, weights, coeffs, None, biases, None, tap)
        return convolve(conv, x, weights, coeffs, None, biases, tap)

    def _expand(self, name: str, group: GeneGroup, coeffs: Tensor, part: str, used: slice | None) -> Any:
        _checks.choice(part, "part", ("weight", "bias", "both"))
        tap = self._tap(name, group)
        weights, biases = group.weights(), group.biases()
        if used is not None and _may_choose(group, tap):
            weights, biases, coeffs, tap = weights[used], biases[used], coeffs[used], tap and tap.part(used)
        weight = bias = None
        if part != "bias":
            weight = _calls.weight(weights, coeffs, None, tap)
        if part != "weight" and biases:
            bias = _calls.weight(biases, coeffs, None, tap, True)
        return {"weight": weight, "bias": bias, "both": (weight, bias)}[part]

    def _tap(self, name: str, group: GeneGroup) -> _calls.AnyTap:
        if not torch.is_grad_enabled():
            return None
        if _calls.transformed():
            return None
        if torch.compiler.is_compiling():
            current = self._pass
            return current.taps.get(name) if current is not None and current.graph == graph_id() else None
        genes = group.tensors()
        if not any(gene.requires_grad for gene in genes) or not all(gene.is_leaf for gene in genes):
            return None
        tap = self._taps.get(name)
        if tap is None or tap.key != key(genes):
            tap = self._taps[name] = Tap(genes, group.num_genes)
        tap.ledger.drop_stale()
        return tap

    def _readable(self, name: str, genes: list[Tensor], x_dtype: torch.dtype, tap: _calls.AnyTap) -> list[Tensor]:
        """The weight genes in the dtype that layers read: as they are, or one low-precision copy per pass."""
        stored = genes[0].dtype
        if stored != torch.float32 or x_dtype not in _checks.HALF or self.compute_dtype in ("param", stored):
            return genes
        wanted = x_dtype if isinstance(self.compute_dtype, str) else self.compute_dtype
        ordinary = tap is None and torch.is_grad_enabled() and any(gene.requires_grad for gene in genes)
        if ordinary or _calls.transformed():
            return [gene.to(wanted) for gene in genes]  # gradients and tangents flow through the cast
        current = self._pass
        if torch.compiler.is_compiling() or current is None:
            return [gene.detach().to(wanted) for gene in genes]
        # Versions cannot be trusted (fused optimizers and `.data` do not raise them), so a copy lives for one pass.
        entry = current.copies.get(name)
        if entry is None or entry[0] != wanted or any(a is not b for a, b in zip(entry[1], genes, strict=True)):
            entry = current.copies[name] = (wanted, genes, [gene.detach().to(wanted) for gene in genes])
        return entry[2]

    def open_pass(self) -> Pass | None:
        """Begin a forward pass; inside a compiled graph this makes its accumulators. Returns the pass before it."""
        before = self._pass
        if not torch.compiler.is_compiling():
            self._pass = Pass()
            return None if before is None or before.graph else before  # a compiled pass may have died midway
        if not exporting():
            graph = graph_id()
            if before is None or before.graph != graph:
                taps = {}
                for name, group in self._groups.items() if torch.is_grad_enabled() else ():
                    tap = _traced_tap(group)
                    if tap is not None:
                        taps[name] = tap
                self._pass = Pass(graph, taps)
        return before

    def in_one_graph(self) -> bool:
        """Whether the pass at hand is one compiled graph; single blocks compiled alone share theirs between layers."""
        return self._pass is not None and self._pass.graph == graph_id()

    def close_pass(self, before: Pass | None) -> None:
        """End a pass begun with `open_pass`."""
        self._pass = before

    def __repr__(self) -> str:
        groups = self._groups.values()
        total = sum(gene.numel() for group in groups for gene in group.tensors())
        return f"GeneBank({len(self._groups)} groups, {total:,} parameters, compute_dtype={self.compute_dtype!r})"


def _check_count(num_genes: object, least: int) -> None:
    if type(num_genes) is not int or not least <= num_genes <= MAX_GENES:
        raise ArgumentError(f"num_genes: expected {least} to {MAX_GENES}, got {num_genes!r}")


def _may_choose(group: GeneGroup, tap: _calls.AnyTap) -> bool:
    """Whether genes may be left out: without a tap, those that are trained would get no gradient, not even zeros."""
    trained = tap is None and torch.is_grad_enabled()
    return not (trained and any(gene.requires_grad for gene in group.tensors()))


def _in_order(genes: nn.ParameterList, count: int) -> list[Tensor]:
    """Gene k under its own number, also where pruning or a parametrization has put a plain tensor in its place."""
    have = genes._parameters
    listed = [have.get(str(k)) for k in range(count)]
    return [genes[k] if gene is None else gene for k, gene in enumerate(listed)]


def _signature(group: GeneGroup) -> tuple[int, tuple[int, ...], tuple[int, ...] | None]:
    bias = None if group.bias is None else tuple(group.bias[0].shape)
    return group.num_genes, tuple(group.weight[0].shape), bias


def _plant(tree: nn.Module, name: str, group: GeneGroup) -> None:
    """Register `group` at a dotted path, making the branches on the way."""
    *branches, leaf = name.split(".")
    try:
        for branch in branches:
            if branch not in tree._modules:
                tree.add_module(branch, nn.Module())
            tree = tree.get_submodule(branch)
        tree.add_module(leaf, group)
    except (KeyError, TypeError) as error:
        raise ArgumentError(f"name: expected a path like 'attn.qkv', got {name!r} ({error.args[0]})") from error


def _traced_tap(group: GeneGroup) -> _calls.TracedTap | None:
    weights, biases = group.weights(), group.biases()
    wanted = [k for k, gene in enumerate(weights) if gene.requires_grad]
    bias_wanted = [k for k, gene in enumerate(biases) if gene.requires_grad]
    if not wanted and not bias_wanted:
        return None
    genes = [weights[k] for k in wanted] + [biases[k] for k in bias_wanted]
    buffers = [accumulator(gene) for gene in genes]
    token = torch.ops.pylearngene.gene_tap(genes, buffers)
    return _calls.TracedTap(token, buffers[: len(wanted)], buffers[len(wanted) :], wanted, bias_wanted)
