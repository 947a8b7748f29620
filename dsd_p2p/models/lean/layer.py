"""One decoder layer over the rows of several sessions, written so that torch can script it.

How it works. `x` holds the hidden states, one row for each node. Two products replace five: q, k and v in one, gate and up
in one. A norm's factor is not applied to the row but to the product's scale. Rotary embedding is one complex product,
because the rows of q and k are interleaved when the layer is built. Keys are written where the cache keeps them.

What makes it exact: a row's bits depend neither on the rows beside it nor on the slots of its ancestors. Each row has its
own scale. Attention uses plain matrix products with at least `FEWEST_HEAD_ROWS` rows, because MKL takes another kernel for
fewer. Slots are padded to `SLOT_PAD`, because elementwise kernels compute a tail differently, and MKL adds up short sums
differently. The softmax's sum is taken in float64, where the order does not show after rounding. The products with the
values are added up in chunks of `CHUNK` positions, because MKL splits sums of more than `LONGEST_SUM` slots.
`dsd_p2p.models.lean.check` tries all of this on the machine at hand.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

CHUNK, LONGEST_SUM = 128, 192
SLOT_PAD = 32
FEWEST_HEAD_ROWS = 6
UNPARTED = 32768

SILU, GELU_TANH, GELU = 0, 1, 2


class Part(NamedTuple):
    """Views that all layers of a pass share for one session's rows: into the products, the queries and the output.

    q_in: complex `[n, kv, group, d/2]`. k_in: complex `[n, kv, d/2]`. v_in: `[n, kv, d]`. q_out: where rotated queries go.
    queries: the same, `[kv, rows * group, d]`. q_turns, k_turns: the rotations. attended: `[kv, rows * group, d]`. result:
    its rows without padding. target: their place in the pass's output.
    """

    q_in: Tensor
    k_in: Tensor
    v_in: Tensor
    q_out: Tensor
    queries: Tensor
    attended: Tensor
    result: Tensor
    target: Tensor


class Slots(NamedTuple):
    """One session's slots in one layer. new_keys, new_values: where this pass's go. keys: `[kv, d, slots]`. values."""

    new_keys: Tensor
    new_values: Tensor
    keys: Tensor
    values: Tensor


class Attention(NamedTuple):
    """What a kind of attention sees of one session: the rotations of its rows, the mask, and the chunks of its slots.

    mask: added to the scores, `[1, rows * group, slots]`. bounds: first and last slot of each chunk, flat. gathered: for each
    chunk its slots, or nothing if they are those between the bounds.
    """

    q_turns: Tensor
    k_turns: Tensor
    mask: Tensor
    bounds: list[int]
    gathered: list[Tensor]


class LeanLayer(nn.Module):
    """A decoder layer. Its parts are set by `dsd_p2p.models.lean.build`.

    norms: before attention and MLP. post_norms: of their results, or nothing (Gemma has them). qk_weight: the norms of q
    and k, `[heads, d]`, or nothing. bias: of q, k and v, or nothing. eps: of all norms, and of those of q and k.
    """

    def __init__(
        self,
        *,
        products: tuple[nn.Module, nn.Module, nn.Module, nn.Module],
        norms: tuple[Tensor, Tensor],
        post_norms: tuple[Tensor, Tensor],
        eps: tuple[float, float],
        bias: Tensor,
        qk_weight: Tensor,
        scaling: float,
        activation: int,
    ) -> None:
        super().__init__()
        self.qkv, self.o, self.gate_up, self.down = products
        self.norm_1, self.norm_2 = norms
        self.post_1, self.post_2 = post_norms
        self.eps, self.qk_eps = (torch.tensor(each) for each in eps)
        self.bias = bias
        self.qk_weight = qk_weight
        self.unparted = UNPARTED
        self.scaling = scaling
        self.activation = activation

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        out: Tensor,
        parts: list[Part],
        slots: list[Slots],
        attention: list[Attention],
    ) -> Tensor:
        """Change the hidden states `x`, `[n, H]`, in place. y, out: workspaces of the product and the attention."""
        rows, sizes = self._normed(x, self.norm_1)
        if self.bias.numel() > 0:
            torch.addcmul(self.bias, self.qkv(rows), sizes, out=y)
        else:
            torch.mul(self.qkv(rows), sizes, out=y)
        if self.qk_weight.numel() > 0:
            num_heads, head_dim = self.qk_weight.size(0), self.qk_weight.size(1)
            heads = y[:, : num_heads * head_dim].view(-1, num_heads, head_dim)
            root = torch.linalg.vector_norm(heads, 2, [-1], True)
            factor = torch.addcmul(self.qk_eps, root, root, value=1.0 / head_dim).rsqrt_()
            heads.mul_(factor).mul_(self.qk_weight)
        for index in range(len(parts)):
            part, mine, sees = parts[index], slots[index], attention[index]
            torch.mul(part.q_in, sees.q_turns, out=part.q_out)
            torch.mul(part.k_in, sees.k_turns, out=mine.new_keys)
            mine.new_values.copy_(part.v_in)
            scores = torch.baddbmm(sees.mask, part.queries, mine.keys, alpha=self.scaling)
            scores.sub_(scores.amax(-1, True)).exp_()
            total = scores.sum(-1, True, dtype=torch.float64).to(torch.float32)
            for chunk in range(len(sees.gathered)):
                slots_of = sees.gathered[chunk]
                if slots_of.numel() > 0:
                    weights, values = scores.index_select(2, slots_of), mine.values.index_select(1, slots_of)
                else:
                    first, end = sees.bounds[2 * chunk], sees.bounds[2 * chunk + 1]
                    weights, values = scores[:, :, first:end], mine.values[:, first:end]
                part.attended.baddbmm_(weights, values, beta=1.0 if chunk > 0 else 0.0)
            part.attended.div_(total)
            part.target.copy_(part.result)
        sizes = out.abs().amax(-1, True).clamp_min_(1e-12)
        self._add(x, self.o(out / sizes), sizes, self.post_1)
        rows, sizes = self._normed(x, self.norm_2)
        product = self.gate_up(rows).mul_(sizes)
        num_inner = product.size(1) // 2
        inner = self._activated(product[:, :num_inner]).mul_(product[:, num_inner:])
        sizes = inner.abs().amax(-1, True).clamp_min_(1e-12)
        self._add(x, self.down(inner / sizes), sizes, self.post_2)
        return x

    def _activated(self, gate: Tensor) -> Tensor:
        """Return the gate's activation.

        torch parts more than `UNPARTED` elements among its threads, in the middle of rows, and an element at a cut is
        computed in another way. So only as many rows are taken at once as one thread takes.
        """
        pieces: list[Tensor] = []
        for piece in torch.split(gate, max(1, self.unparted // gate.size(1))):
            if self.activation == 0:
                pieces.append(nn.functional.silu(piece))
            elif self.activation == 1:
                pieces.append(nn.functional.gelu(piece, approximate="tanh"))
            else:
                pieces.append(nn.functional.gelu(piece))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _add(self, x: Tensor, product: Tensor, sizes: Tensor, post_norm: Tensor) -> None:
        """Add a product, scaled and normed, to the hidden states."""
        if post_norm.numel() == 0:
            x.addcmul_(product, sizes)
        else:
            product = product.mul_(sizes)
            root = torch.linalg.vector_norm(product, 2, [-1], True)
            factor = torch.addcmul(self.eps, root, root, value=1.0 / x.size(1)).rsqrt_()
            x.addcmul_(product.mul_(post_norm), factor)

    def _normed(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return normed rows divided by their largest magnitude, and what the product has to be multiplied with."""
        rows = x * weight
        sizes = rows.abs().amax(-1, True).clamp_min_(1e-12)
        root = torch.linalg.vector_norm(x, 2, [-1], True)
        factor = torch.addcmul(self.eps, root, root, value=1.0 / x.size(1)).rsqrt_()
        return rows.div_(sizes), sizes.mul_(factor)
