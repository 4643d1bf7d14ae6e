# SPDX-License-Identifier: Apache-2.0
"""`ExpansionMultiheadAttention` against `nn.MultiheadAttention` with the dense weights; its views and refusals."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pylearngene as plg
from pylearngene.nn import ExpansionMultiheadAttention, GeneBank
from pylearngene.nn.expansion_attention import PROJECTIONS

B, T, S, E, H = 3, 4, 5, 8, 2
COEFFS = [1.0, -0.5]


def layer_of(dtype: torch.dtype = torch.float64, **options: Any) -> ExpansionMultiheadAttention:
    """A layer with genes of random values, in evaluation mode."""
    settings = {"batch_first": True, "bank": GeneBank(), "name": "block.attn", "coeffs": COEFFS, **options}
    layer = ExpansionMultiheadAttention(E, H, dtype=dtype, **settings)
    for gene in layer.bank.parameters():
        nn.init.normal_(gene, std=0.5)
    return layer.eval()


def inputs(layer: ExpansionMultiheadAttention, batched: bool = True, itself: bool = False) -> list[Tensor]:
    """Query, key and value, in the layout that the layer wants."""
    widths = (E, layer.kdim, layer.vdim)
    tensors = []
    for width, tokens in zip(widths, (T, T, T) if itself else (T, S, S), strict=True):
        x = torch.randn((B, tokens, width) if batched else (tokens, width), dtype=torch.float64)
        tensors.append((x if layer.batch_first or not batched else x.transpose(0, 1)).requires_grad_())
    return tensors


def compare(layer: ExpansionMultiheadAttention, tensors: list[Tensor], **options: Any) -> None:
    """Outputs, attention weights, and gradients of inputs and genes are those of the plain layer."""
    plain = layer.to_dense().train(layer.training)
    twins = [x.detach().clone().requires_grad_() for x in tensors]
    state = torch.get_rng_state()
    found, weights = layer(*tensors, **options)
    torch.set_rng_state(state)
    expected, expected_weights = plain(*twins, **options)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert (weights is None) == (expected_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, expected_weights, rtol=1e-10, atol=1e-10)
    dy = torch.randn_like(found)
    found.backward(dy)
    expected.backward(dy)
    for x, twin in zip(tensors, twins, strict=True):
        torch.testing.assert_close(x.grad, twin.grad, rtol=1e-10, atol=1e-10)
    separate = plain.in_proj_weight is None
    names = [f"{part}_weight" for part in PROJECTIONS[:3]]
    dense = [getattr(plain, name).grad for name in names] if separate else list(plain.in_proj_weight.grad.chunk(3))
    for projection, gradient in zip(PROJECTIONS, [*dense, plain.out_proj.weight.grad], strict=True):
        group = layer.bank.group(f"block.attn.{projection}")
        for coefficient, gene in zip(COEFFS, group.weight, strict=True):
            torch.testing.assert_close(gene.grad, coefficient * gradient, rtol=1e-9, atol=1e-10)
    if plain.in_proj_bias is not None:
        biases = [*plain.in_proj_bias.grad.chunk(3), plain.out_proj.bias.grad]
        for projection, gradient in zip(PROJECTIONS, biases, strict=True):
            gene = layer.bank.group(f"block.attn.{projection}").bias[1]
            torch.testing.assert_close(gene.grad, COEFFS[1] * gradient, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"batch_first": False}, {"kdim": 6, "vdim": 7}, {"vdim": 6, "bias": False}],
)
def test_results_and_gradients_of_every_form(options: dict[str, Any], need_weights: bool) -> None:
    layer = layer_of(**options)
    compare(layer, inputs(layer), need_weights=need_weights)
    layer.bank.zero_grad()
    compare(layer, inputs(layer, batched=False), need_weights=need_weights)


def bools(*shape: int) -> Tensor:
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False  # no row is left without a key
    return mask


MASKS: dict[str, Callable[[], dict[str, Any]]] = {
    "bool": lambda: {"attn_mask": bools(T, S)},
    "added": lambda: {"attn_mask": torch.randn(T, S, dtype=torch.float64)},
    "per head": lambda: {"attn_mask": bools(B * H, T, S)},
    "padding": lambda: {"key_padding_mask": bools(B, S)},
    "padding added": lambda: {"key_padding_mask": torch.randn(B, S, dtype=torch.float64)},
    "both": lambda: {"key_padding_mask": bools(B, S), "attn_mask": bools(T, S)},
    "both, per head": lambda: {"key_padding_mask": bools(B, S), "attn_mask": bools(B * H, T, S)},
}


@pytest.mark.parametrize("options", [{"need_weights": False}, {}, {"average_attn_weights": False}])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str, options: dict[str, Any]) -> None:
    layer = layer_of()
    compare(layer, inputs(layer), **MASKS[mask](), **options)


@pytest.mark.parametrize("options", [{"need_weights": False}, {}])
def test_causal_attention(options: dict[str, Any]) -> None:
    layer = layer_of()
    causal = nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64)
    for changes in ({}, {"key_padding_mask": torch.zeros(B, T, dtype=torch.float64)}):
        compare(layer, inputs(layer, itself=True), attn_mask=causal, is_causal=True, **changes, **options)
        layer.bank.zero_grad()


def test_masks_without_a_batch() -> None:
    layer = layer_of()
    for masks in ({"key_padding_mask": bools(S)}, {"attn_mask": bools(T, S)}, {"attn_mask": bools(H, T, S)}):
        compare(layer, inputs(layer, batched=False), average_attn_weights=False, **masks)
        layer.bank.zero_grad()


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_draws_as_the_plain_layer(need_weights: bool) -> None:
    layer = layer_of(dropout=0.4).train()
    compare(layer, inputs(layer), need_weights=need_weights)
    layer.eval()
    tensors = inputs(layer)
    assert torch.equal(layer(*tensors)[0], layer(*tensors)[0])


def test_no_dense_weight_is_built_and_views_are_free() -> None:
    layer, before = layer_of(), plg.nn.dense_syntheses()
    layer(*inputs(layer))[0].sum().backward()
    assert (layer.in_proj_weight.shape, layer.in_proj_bias.shape) == ((3 * E, E), (3 * E,))
    assert (layer.in_proj_weight.dtype, layer.in_proj_weight.ndim, len(layer.in_proj_weight)) == (torch.float64, 2, 24)
    assert (layer.in_proj_weight.size(0), layer.in_proj_weight.numel()) == (24, 192)
    assert (layer.out_proj.weight.shape, layer.out_proj.bias.shape) == ((E, E), (E,))
    assert layer.q_proj_weight is layer.k_proj_weight is layer.v_proj_weight is None
    assert plg.nn.dense_syntheses() == before
    assert not hasattr(layer, "weight")
    plain = layer.to_dense()
    torch.testing.assert_close(layer.in_proj_weight + 0, plain.in_proj_weight)
    torch.testing.assert_close(layer.in_proj_bias + 0, plain.in_proj_bias)
    torch.testing.assert_close(layer.out_proj.weight + 0, plain.out_proj.weight)
    torch.testing.assert_close(layer.out_proj.bias + 0, plain.out_proj.bias)
    torch.testing.assert_close(layer.dense_weight("k_proj"), plain.in_proj_weight[E : 2 * E])
    other = layer_of(kdim=6, vdim=7, bias=False)
    plain = other.to_dense()
    assert other.in_proj_weight is other.in_proj_bias is other.out_proj.bias is None
    for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        torch.testing.assert_close(getattr(other, name) + 0, getattr(plain, name))


def test_copies_are_independent_and_pickles_whole() -> None:
    layer = layer_of(learn_coeffs=True)
    tensors = inputs(layer)
    expected = layer(*tensors)[0]
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(*tensors)[0], expected)
        twin.set_coeffs([2.0, 0.0])
        assert torch.equal(layer(*tensors)[0], expected)
    layer(*tensors)[0].square().sum().backward()
    assert layer.coeffs.grad.abs().min() > 0


def test_low_precision_and_meta() -> None:
    layer = layer_of(torch.float32)
    x = torch.randn(B, T, E)
    expected = layer(x, x, x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found, dense = (one(x, x, x, need_weights=False)[0] for one in (layer, layer.to_dense()))
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() <= 2 * (dense.float() - expected).abs().max()
    meta = layer_of(torch.float32, device="meta")
    assert meta(*[torch.zeros(B, T, E, device="meta")] * 3)[0].shape == (B, T, E)


def test_a_compiled_layer_is_one_graph_of_the_same_results() -> None:
    layer = layer_of(dropout=0.0)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    tensors = inputs(layer)
    for options in ({}, {"need_weights": False, "key_padding_mask": bools(B, S)}):
        layer.bank.zero_grad()
        expected = layer(*tensors, **options)[0]
        expected.square().sum().backward()
        gradients = [gene.grad.clone() for gene in layer.bank.parameters()]
        layer.bank.zero_grad()
        found = compiled(*tensors, **options)[0]
        found.square().sum().backward()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        for gene, gradient in zip(layer.bank.parameters(), gradients, strict=True):
            torch.testing.assert_close(gene.grad, gradient, rtol=1e-10, atol=1e-10)


def test_representation_is_one_line() -> None:
    expected = "ExpansionMultiheadAttention(8, num_heads=2, batch_first=True, name='block.attn', coeffs=[1, -0.5])"
    assert repr(layer_of()) == expected


def made(*sizes: int, **options: Any) -> ExpansionMultiheadAttention:
    return ExpansionMultiheadAttention(*sizes, **{"bank": GeneBank(), "name": "n", "coeffs": [1.0], **options})


def of_other_size() -> None:
    bank = GeneBank()
    made(8, 2, bank=bank)
    made(4, 2, bank=bank)


def attend(**options: Any) -> Any:
    layer = layer_of()
    return layer(*inputs(layer), **options)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


REFUSED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "heads": (lambda: made(8, 3), "ArgumentError", "embed_dim: expected a multiple of num_heads = 3, got 8"),
    "no heads": (lambda: made(8, 0), "ArgumentError", "num_heads: expected an int of at least 1, got 0"),
    "width": (lambda: made(-8, 2), "ArgumentError", "embed_dim: expected an int of at least 1, got -8"),
    "no width": (lambda: made(0, 2), "ArgumentError", "embed_dim: expected an int of at least 1, got 0"),
    "kdim": (lambda: made(8, 2, kdim=-1), "ArgumentError", "kdim: expected an int of at least 0, got -1"),
    "dropout": (lambda: made(8, 2, dropout=1.5), "ArgumentError", "dropout: expected a number from 0 to 1, got 1.5"),
    "keys": (lambda: made(8, 2, add_bias_kv=True), "ArgumentError", r"add_bias_kv: expected False .*, got True"),
    "zeros": (lambda: made(8, 2, add_zero_attn=True), "ArgumentError", r"add_zero_attn: expected False .*, got True"),
    "bank": (lambda: made(8, 2, bank=None), "ArgumentError", "bank: expected a GeneBank, got NoneType"),
    "other": (of_other_size, "ShapeError", r"n.q_proj: expected .* got \(1, \(4, 4\), \(4,\)\)"),
    "causal": (
        lambda: attend(is_causal=True),
        "ArgumentError",
        "attn_mask: expected a mask where is_causal is given, got None",
    ),
    "axes": (
        lambda: layer_of()(zeros(E), zeros(E), zeros(E)),
        "ShapeError",
        r"query: expected 2 or 3 axes, as many as query, got \[8\]",
    ),
    "other axes": (
        lambda: layer_of()(zeros(B, T, E), zeros(T, E), zeros(T, E)),
        "ShapeError",
        r"key: expected 2 or 3 axes, as many as query, got \[4, 8\]",
    ),
    "batch": (
        lambda: layer_of()(zeros(B, T, E), zeros(2, S, E), zeros(2, S, E)),
        "ShapeError",
        "key: expected a batch of 3, as query, got 2",
    ),
    "tokens": (
        lambda: layer_of()(zeros(B, T, E), zeros(B, S, E), zeros(B, T, E)),
        "ShapeError",
        r"value: expected as many tokens as key, \[3, 5\], got \[3, 4, 8\]",
    ),
    "value width": (
        lambda: layer_of()(zeros(B, T, E), zeros(B, S, E), zeros(B, S, 7)),
        "ShapeError",
        r"value: expected shape \[\*, vdim\] with vdim = 8, got \[3, 5, 7\]",
    ),
    "mask": (
        lambda: attend(attn_mask=bools(T, T)),
        "ShapeError",
        r"attn_mask: expected shape \[T, S\] = \[4, 5\], got \[4, 4\]",
    ),
    "mask per head": (
        lambda: attend(attn_mask=bools(B, T, S)),
        "ShapeError",
        r"attn_mask: expected shape \[B \* H, T, S\] = \[6, 4, 5\], got \[3, 4, 5\]",
    ),
    "padding": (
        lambda: attend(key_padding_mask=bools(B, T)),
        "ShapeError",
        r"key_padding_mask: expected shape \[B, S\] = \[3, 5\], got \[3, 4\]",
    ),
    "mask dtype": (
        lambda: attend(attn_mask=torch.zeros(T, S, dtype=torch.int64)),
        "DTypeError",
        "attn_mask: expected bool or a floating dtype, got int64",
    ),
    "padding dtype": (
        lambda: attend(key_padding_mask=torch.zeros(B, S, dtype=torch.int64)),
        "DTypeError",
        "key_padding_mask: expected bool or a floating dtype, got int64",
    ),
    "no tensor": (lambda: layer_of()(zeros(B, T, E), None, None), "DTypeError", "key: expected a torch.Tensor"),
    "mixed": (lambda: layer_of()(*[torch.zeros(B, T, E)] * 3), "DTypeError", "query: expected float64"),
    "device": (
        lambda: layer_of()(*[torch.zeros(B, T, E, device="meta")] * 3),
        "DeviceError",
        "query: expected device cpu",
    ),
    "key width": (
        lambda: layer_of()(zeros(B, T, E), zeros(B, S, 7), zeros(B, S, E)),
        "ShapeError",
        r"key: expected shape \[\*, kdim\] with kdim = 8, got \[3, 5, 7\]",
    ),
    "key device": (
        lambda: layer_of()(zeros(B, T, E), zeros(B, S, E).to("meta"), zeros(B, S, E)),
        "DeviceError",
        "key: expected device cpu",
    ),
    "value integers": (
        lambda: layer_of()(zeros(B, T, E), zeros(B, S, E), zeros(B, S, E).int()),
        "DTypeError",
        "value: expected float32, .* got int32",
    ),
    "mask list": (
        lambda: attend(attn_mask=[[False] * S] * T),
        "DTypeError",
        "attn_mask: expected a torch.Tensor, got list",
    ),
    "mask device": (
        lambda: attend(attn_mask=bools(T, S).to("meta")),
        "DeviceError",
        r"attn_mask: expected device cpu \(that of query\), got meta",
    ),
    "padding device": (
        lambda: attend(key_padding_mask=bools(B, S).to("meta")),
        "DeviceError",
        r"key_padding_mask: expected device cpu \(that of query\), got meta",
    ),
    "projection": (
        lambda: layer_of().dense_weight("qkv"),
        "ArgumentError",
        "projection: expected one of 'q_proj', 'k_proj', 'v_proj', 'out_proj', got 'qkv'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input(case: str) -> None:
    make, kind, message = REFUSED[case]
    with pytest.raises(getattr(plg.errors, kind), match=message):
        make()


@pytest.mark.parametrize("taken", ["q_proj", "k_proj", "out_proj"])
def test_a_group_that_does_not_fit_leaves_no_other_behind(taken: str) -> None:
    bank = GeneBank()
    bank.add_group(f"n.{taken}", plg.nn.ExpansionGroup, 1, (5, 5), None)
    with pytest.raises(plg.errors.ShapeError, match=rf"n.{taken}: expected .* got \(1, \(8, 8\), \(8,\)\)"):
        ExpansionMultiheadAttention(8, 2, bank=bank, name="n", coeffs=[1.0])
    assert list(bank.groups) == [f"n.{taken}"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_kept_tokens_of_padded_batches_are_those_of_the_plain_encoder() -> None:
    """The plain encoder packs them in eval mode and writes zeros for the others, which nobody is to read."""
    block = nn.TransformerEncoderLayer(E, H, 16, batch_first=True)
    plain = nn.TransformerEncoder(block, 2, enable_nested_tensor=True).eval()
    padding = torch.tensor([[False] * 4, [False, False, True, True], [False, False, False, True]])
    backed = plg.auxiliary(plain, plg.methods.TLEG()).eval()
    x = torch.randn(B, T, E)
    with torch.no_grad():
        expected = plg.bake(backed)(x, src_key_padding_mask=padding)
        found = backed(x, src_key_padding_mask=padding)
    assert not expected[padding].any()
    torch.testing.assert_close(found[~padding], expected[~padding])
