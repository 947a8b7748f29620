"""Builds lean layers from transformers' own modules, and refuses what they cannot compute."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dsd_p2p.errors import ModelError
from dsd_p2p.models.checkpoints.base import Groups
from dsd_p2p.models.lean.layer import GELU, GELU_TANH, SILU, LeanLayer
from dsd_p2p.models.lean.products import (
    FloatProduct,
    Int4Product,
    Int8Product,
    Int8TwiceProduct,
    MakeProduct,
    Weight,
    has_int4,
    num_bytes_of,
)
from dsd_p2p.models.lean.rotary import NO_ROTATION

_ACTIVATIONS = {
    "SiLUActivation": SILU,
    "SiLU": SILU,
    "GELUTanh": GELU_TANH,
    "PytorchGELUTanh": GELU_TANH,
    "NewGELUActivation": GELU_TANH,
    "GELUActivation": GELU,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """The heads of a layer's attention; all layers of a lean span have the same."""

    num_q: int
    num_kv: int
    head_dim: int

    @property
    def group(self) -> int:
        """The queries that share a key."""
        return self.num_q // self.num_kv


@dataclass(frozen=True, slots=True, kw_only=True)
class Products:
    """What makes a layer's products from its weights."""

    qkv: MakeProduct
    o: MakeProduct
    gate_up: MakeProduct
    down: MakeProduct

    @classmethod
    def all(cls, make: MakeProduct) -> "Products":
        """Return one way for all."""
        return cls(qkv=make, o=make, gate_up=make, down=make)


GroupsOf = Callable[[str], Groups | None]
"""Returns a matrix's 4-bit numbers by its name in the layer, such as `mlp.up_proj.weight`."""


def no_groups(name: str) -> None:
    """Return nothing: all matrices are floats."""
    del name


IN_FLOAT = Products.all(lambda weight: FloatProduct(weight.floats))

IN_INT8 = Products(
    qkv=lambda weight: Int8TwiceProduct(weight.floats),
    o=lambda weight: Int8Product(weight.floats),
    gate_up=lambda weight: Int8Product(weight.floats),
    down=lambda weight: Int8TwiceProduct(weight.floats),
)


def _stored_or(make: MakeProduct) -> MakeProduct:
    """Return what computes with a matrix's own 4-bit numbers where it can, else with what `make` makes."""
    return lambda weight: Int4Product(weight.groups) if weight.groups and has_int4(weight) else make(weight)


AS_STORED = Products(
    qkv=_stored_or(IN_INT8.qkv),
    o=_stored_or(IN_INT8.o),
    gate_up=_stored_or(IN_INT8.gate_up),
    down=_stored_or(IN_INT8.down),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A lean layer. kind: of attention. rotation: the name of its rotary table. num_bytes: those of its weights."""

    run: Any
    heads: Heads
    kind: str
    rotation: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """An RMS norm. weight: as it multiplies, whether the family stores `w` or `w - 1`."""

    weight: Tensor
    eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Norms:
    """The norms of a layer: before attention and MLP, and the weights of those after them, or nothing."""

    attention: Norm
    mlp: Norm
    post_attention: Tensor
    post_mlp: Tensor


@torch.inference_mode()
def build_layer(
    layer: nn.Module, kind: str, make: Products, groups_of: GroupsOf = no_groups, *, is_scripted: bool = True
) -> Built:
    """Return the lean form of one of transformers' decoder layers.

    Raises:
        ModelError: the layer has parts that are not known here.
    """
    try:
        attention: Any = layer.self_attn
        mlp: Any = layer.mlp
        head_dim, scaling = int(attention.head_dim), float(attention.scaling)
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        gate, up, down, o = mlp.gate_proj, mlp.up_proj, mlp.down_proj, attention.o_proj
        norms = norms_of(layer)
        activation = _ACTIVATIONS[type(mlp.act_fn).__name__]
    except (AttributeError, KeyError) as exc:
        raise ModelError(f"a layer of another build, at {exc}") from exc
    if any(each.bias is not None for each in (o, gate, up, down)):
        raise ModelError("a bias in the output of attention or MLP")
    q, k, v = (
        _weight(each, f"self_attn.{name}_proj", groups_of) for name, each in zip("qkv", projections, strict=True)
    )
    heads = Heads(num_q=len(q.floats) // head_dim, num_kv=len(k.floats) // head_dim, head_dim=head_dim)
    interleaved = partial(_interleaved, head_dim=head_dim)
    bias = torch.empty(0)
    if projections[0].bias is not None:
        parts = [each.bias.float() for each in projections]
        bias = torch.cat([_interleaved(parts[0], head_dim), _interleaved(parts[1], head_dim), parts[2]])
    qk_weight, qk_eps = _qk_norm(attention, heads)
    products = (
        make.qkv(Weight.cat([q.map(interleaved), k.map(interleaved), v])),
        make.o(_weight(o, "self_attn.o_proj", groups_of)),
        make.gate_up(Weight.cat([_weight(gate, "mlp.gate_proj", groups_of), _weight(up, "mlp.up_proj", groups_of)])),
        make.down(_weight(down, "mlp.down_proj", groups_of)),
    )
    built = LeanLayer(
        products=products,
        norms=(norms.attention.weight, norms.mlp.weight),
        post_norms=(norms.post_attention, norms.post_mlp),
        eps=(norms.attention.eps, qk_eps),
        bias=bias,
        qk_weight=qk_weight,
        scaling=scaling,
        activation=activation,
    )
    # Some layers of SmolLM3 rotate nothing.
    rotates = bool(getattr(attention, "use_rope", True))
    return Built(
        run=_scripted(built) if is_scripted else built,
        heads=heads,
        kind=kind,
        rotation=kind if rotates else NO_ROTATION,
        num_bytes=sum(num_bytes_of(each) for each in products),
    )


def _weight(module: Any, name: str, groups_of: GroupsOf) -> Weight:
    return Weight(floats=module.weight.float(), groups=groups_of(f"{name}.weight"))


def norms_of(layer: Any) -> Norms:
    """Return the norms of a layer.

    Raises:
        AttributeError: a norm is missing.
        ModelError: one is of another kind.
    """
    found = [norm_of(layer.input_layernorm), norm_of(mlp_norm(layer))]
    if hasattr(layer, "pre_feedforward_layernorm"):
        found += [norm_of(layer.post_attention_layernorm), norm_of(layer.post_feedforward_layernorm)]
    if len({each.eps for each in found}) > 1:
        raise ModelError("norms with different epsilons")
    post = [each.weight for each in found[2:]] or [torch.empty(0), torch.empty(0)]
    return Norms(attention=found[0], mlp=found[1], post_attention=post[0], post_mlp=post[1])


def mlp_norm(layer: Any) -> Any:
    """Return the module of the norm before a layer's MLP."""
    return getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm)


def norm_of(module: Any) -> Norm:
    """Return an RMS norm's weight and epsilon. A row of large equal numbers comes out as the weight.

    Raises:
        ModelError: it is another kind of norm.
    """
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, float) or getattr(module, "bias", None) is not None:
        raise ModelError(f"a norm of another kind, {type(module).__name__}")
    return Norm(weight=module(torch.full((1, module.weight.numel()), 1e3))[0].float().contiguous(), eps=eps)


def _qk_norm(attention: Any, heads: Heads) -> tuple[Tensor, float]:
    if getattr(attention, "q_norm", None) is None:
        return torch.empty(0), 0.0
    q, k = norm_of(attention.q_norm), norm_of(attention.k_norm)
    if q.weight.numel() != heads.head_dim or q.eps != k.eps:
        raise ModelError("a norm over all heads")
    rows = [
        _interleaved(each.weight, heads.head_dim).expand(count, -1)
        for each, count in ((q, heads.num_q), (k, heads.num_kv))
    ]
    return torch.cat(rows), q.eps


def _interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """Let the rows of the first and second half of each head alternate, so that a rotation is a complex product."""
    return rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _scripted(layer: LeanLayer) -> Any:
    """Return the layer without Python's share, a fifth of a pass over one row."""
    with warnings.catch_warnings():
        # torch deprecates scripting and has no other way to run a layer without Python and without a compiler.
        warnings.simplefilter("ignore")
        return torch.jit.script(layer.eval())
