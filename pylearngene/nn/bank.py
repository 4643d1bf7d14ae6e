# SPDX-License-Identifier: Apache-2.0
"""`GeneBank`: the one owner of all genes of a network, whatever their primitives.

Layers hold an unregistered reference and call the bank, so each gene is one Parameter with one state-dict key. The
bank keeps no synthesized weight; what it keeps between calls (taps, low-precision copies of genes) is dropped when it
is copied or pickled. What is computed with the genes is said by their group, one class per primitive.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.modules.module as _everywhere
from torch import Tensor, nn

from pylearngene import _checks
from pylearngene.errors import ArgumentError, ShapeError
from pylearngene.functional._context import transformed
from pylearngene.functional._tap import Tap, stream_on
from pylearngene.nn._group import GeneGroup
from pylearngene.nn._pass import Pass, exporting, gene_backed_class, graph_id, plain_class
from pylearngene.nn._wrapping import check_bank, check_whole, recomputed

Group = TypeVar("Group", bound=GeneGroup)
POLICIES = ("auto", "param")


class GeneBank(nn.Module):
    """Owns the genes of a network, and applies them for its layers.

    Every layer of one name computes with the same genes: `W[l] = sum_k c[l, k] G_k` for `expansion`. Each gene gets
    one ordinary gradient per backward pass, summed in float32 over all layers. Register the bank once, at the root,
    with `attach`.

    Args:
        compute_dtype: what layers read when x is bfloat16 or float16 and genes are float32. `"auto"`: one copy of each
            gene in x's dtype, per forward pass of the model; the genes themselves where the bank was never attached to
            one. `"param"`: the float32 genes themselves (exact where genes cancel, twice the bytes to read). Or a
            dtype, for copies in it.

    Attributes:
        genes: the tree of groups; a gene's state-dict key is `genes.<layer>.` and its key in the group: `weight.0`.
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

    # Whether to a model, ever: what a checkpoint runs again, outside the pass, must read what the pass has read.
    _attached = False

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
        self._pass: Pass | None = None  # of the graph being traced
        self._passes: dict[int, Pass] = {}  # eager ones, by thread

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_taps": {}, "_pass": None, "_passes": {}}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._forget()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def attach(self, model: nn.Module) -> None:
        """Register this bank as `model.gene_bank`, and mark where the model's forward passes begin and end.

        The model gets a subclass of its class, of the same name, whose forward does that. Layers work without it too;
        then genes are read in float32, without copies, and compiled graphs return one gradient per layer.

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
        self._attached = True

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
        kind: type[Group],
        *sizes: Any,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Group:
        """The group called `name`, made at the first call and shared at every later one.

        Args:
            name: path of the layer inside its block, like `"attn.qkv"`.
            kind: class of the group, that of its primitive.
            *sizes: what the class takes: numbers, shapes as tuples.
            device: of new genes.
            dtype: of new genes.

        Raises:
            ArgumentError: the name is empty, not usable, or that of a group of another primitive or of what holds
                groups; `kind` is no class of groups; or what `kind` says.
            ShapeError: the group exists with other sizes.
            ShardingError: the group is new, and the genes are sharded over processes.
        """
        if not isinstance(name, str):
            raise ArgumentError(f"name: expected a path like 'attn.qkv', got {name!r}")
        if not (isinstance(kind, type) and issubclass(kind, GeneGroup)):
            raise ArgumentError(f"kind: expected a class of gene groups, got {kind!r}")
        group = self._groups.get(name)
        if group is None:
            check_whole(self)
            make: Callable[..., Group] = kind
            made = make(*sizes, device=device, dtype=dtype)
            _plant(self.genes, name, made)
            self._groups[name] = made
            return made
        if not isinstance(group, kind):
            raise ArgumentError(f"name: expected one for {kind.primitive}, got {name!r}, a group of {group.primitive}")
        if group.sizes != sizes:
            raise ShapeError(f"{name}: expected {kind.letters} = {group.sizes} as in the bank, got {sizes}")
        return group

    def grow_group(self, name: str, num_genes: int) -> Any:
        """The group called `name`, with genes of zeros after those it has, so that there are `num_genes`.

        The layers of the group need as many coefficients: `layer.set_coeffs`.

        Args:
            name: the group, of `expansion`.
            num_genes: K from now on, at least as many as there are.

        Raises:
            ArgumentError: there is no such group, or it cannot grow; or K is no int, below what it has or above 64.
            ShardingError: the genes are sharded over processes.
        """
        check_whole(self)
        group = self.group(name)
        group.grow(num_genes)
        self._forget()
        return group

    def group(self, name: str) -> Any:
        """The group called `name`; its class is that of its primitive.

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
            for inside, gene in group.named_genes():
                yield f"{name}.{inside}", gene

    def reset_parameters(self) -> None:
        """Fresh values for every gene (after `to_empty`, for instance)."""
        for group in self._groups.values():
            group.reset_parameters()

    def unhooked(self) -> bool:
        """Whether calling the bank does nothing but call its forward, which layers may do at once then."""
        own = self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks
        anywhere = _everywhere._has_any_global_hook() or self._compiled_call_impl is not None
        return not (own or anywhere or torch.compiler.is_compiling())

    def plain(self) -> bool:
        """Whether calling the bank does nothing but apply a group, which layers may do at once then."""
        replaced = "forward" in self.__dict__ or type(self).forward is not GeneBank.forward
        return not replaced and self.unhooked()

    def forward(self, name: str, *inputs: Any, **options: Any) -> Any:
        """Apply a group: here, so that hooks on the bank see every use of a gene.

        Args:
            name: the group.
            *inputs: what `compute` of the group takes.
            **options: likewise.

        Raises:
            ArgumentError: there is no such group.
        """
        group = self._groups.get(name)
        if group is None:
            group = self.group(name)
        return group.compute(self, name, *inputs, **options)

    def tap(self, name: str, group: GeneGroup) -> Any:
        """What a group, called `name`, hangs its gradients on; None where autograd is to treat genes as any tensor."""
        if not torch.is_grad_enabled():
            return None
        if transformed():
            return None
        if torch.compiler.is_compiling():
            current = self._pass
            return current.taps.get(name) if current is not None and current.graph == graph_id() else None
        return self.eager_tap(name, group, group.tensors())

    def eager_tap(self, name: str, group: GeneGroup, genes: Sequence[Tensor]) -> Tap | None:
        """As `tap` where gradients are on and nothing transforms or compiles; `genes` are all those of the group."""
        tap = self._taps.get(name)
        if tap is None or not tap.fits(genes):
            if not any(gene.requires_grad for gene in genes) or not all(gene.is_leaf for gene in genes):
                return None
            check_bank(self)
            tap = self._taps.pop(name, None)
            del tap  # with it would live autograd's memory of the shapes that genes had
            tap = self._taps[name] = group.new_tap(genes)
        return tap if torch._C._current_graph_task_id() == -1 else recomputed(self, tap)

    def readable(self, name: str, genes: list[Tensor], x_dtype: torch.dtype, tap: Any) -> list[Tensor]:
        """Genes in the dtype that layers read: as they are, or one low-precision copy per pass."""
        stored = genes[0].dtype
        if stored != torch.float32 or x_dtype not in _checks.HALF or self.compute_dtype in ("param", stored):
            return genes
        wanted = x_dtype if isinstance(self.compute_dtype, str) else self.compute_dtype
        ordinary = tap is None and torch.is_grad_enabled() and any(gene.requires_grad for gene in genes)
        if ordinary or transformed():
            return [gene.to(wanted) for gene in genes]  # gradients and tangents flow through the cast
        current = self.current_pass()
        if current is None and self.compute_dtype == "auto" and not self._attached:
            return genes  # a copy would serve this call alone
        if torch.compiler.is_compiling() or current is None:
            return [gene.detach().to(wanted) for gene in genes]
        # Versions cannot be trusted (fused optimizers and `.data` do not raise them), so a copy lives for one pass.
        place = (name, stream_on(genes[0].device))  # another stream might read a copy before it is written
        entry = current.copies.get(place)
        if entry is None or entry[0] != wanted or any(a is not b for a, b in zip(entry[1], genes, strict=True)):
            entry = current.copies[place] = (wanted, genes, [gene.detach().to(wanted) for gene in genes])
        return entry[2]

    def open_pass(self) -> Pass | None:
        """Begin a forward pass; inside a compiled graph this makes its accumulators. Returns the pass before it."""
        if not torch.compiler.is_compiling():
            if self._pass is not None:  # a compiled pass may have died midway
                self._pass = None
            around = self.current_pass()
            if around is None:  # what was made on one stream would make this pass wait there, and spoil its capture
                for name in [name for name, tap in self._taps.items() if tap.elsewhere()]:
                    self._taps.pop(name, None)
            self._passes[threading.get_ident()] = Pass()
            return around
        before = self._pass
        if not exporting():
            graph = graph_id()
            if before is None or before.graph != graph:
                taps = {}
                for name, group in self._groups.items() if torch.is_grad_enabled() else ():
                    tap = group.traced_tap()
                    if tap is not None:
                        taps[name] = tap
                self._pass = Pass(graph, taps)
        return before

    def current_pass(self) -> Pass | None:
        """The pass that this thread is in, or that of the graph being traced."""
        return self._pass if torch.compiler.is_compiling() else self._passes.get(threading.get_ident())

    def in_one_graph(self) -> bool:
        """Whether the pass at hand is one compiled graph; single blocks compiled alone share theirs between layers."""
        return self._pass is not None and self._pass.graph == graph_id()

    def close_pass(self, before: Pass | None) -> None:
        """End a pass begun with `open_pass`."""
        if torch.compiler.is_compiling():
            self._pass = before
        elif before is None:
            self._passes.pop(threading.get_ident(), None)
        else:
            self._passes[threading.get_ident()] = before

    def __repr__(self) -> str:
        groups = self._groups.values()
        total = sum(gene.numel() for group in groups for gene in group.tensors())
        return f"GeneBank({len(self._groups)} groups, {total:,} parameters, compute_dtype={self.compute_dtype!r})"


def _plant(tree: nn.Module, name: str, group: GeneGroup) -> None:
    """Register `group` at a dotted path, making the branches on the way."""
    *branches, leaf = name.split(".")
    grown: list[tuple[nn.Module, str]] = []
    try:
        for branch in branches:
            if branch not in tree._modules:
                tree.add_module(branch, nn.Module())
                grown.append((tree, branch))
            tree = tree.get_submodule(branch)
        if leaf in tree._modules:
            raise KeyError(f"module {leaf!r} already exists")
        tree.add_module(leaf, group)
    except (KeyError, TypeError) as error:
        for parent, branch in grown[:1]:
            del parent._modules[branch]
        raise ArgumentError(f"name: expected a path like 'attn.qkv', got {name!r} ({error.args[0]})") from error
