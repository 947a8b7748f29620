"""Reads the rows of a pass and splits its results: what every way to run a span does before and after the layers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dsd_p2p.cache.passes import SpanOutput, SpanPass, hidden_of, views_of
from dsd_p2p.cache.slots import Forward
from dsd_p2p.errors import DsdError, ModelError, RemoteProtocolError
from dsd_p2p.models.architecture import LayerShape, ModelShape
from dsd_p2p.types import TokenId
from dsd_p2p.verification.grammar import Grammars


class LogitsRow:
    """The target's view after one node (`dsd_p2p.verification.base.TargetView`)."""

    def __init__(self, row: torch.Tensor, argmax: TokenId) -> None:
        self.row = row
        self._argmax = argmax

    def argmax(self) -> TokenId:
        """Return the token with the greatest logit."""
        return self._argmax

    def logits(self) -> NDArray[np.float32]:
        """Return the logits, float32 `[V]`."""
        array: NDArray[np.float32] = self.row.float().cpu().numpy()
        return array


def read_inputs(each: SpanPass, shape: ModelShape, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Return the pass's inputs as a tensor: token ids `[1, n]` at the head, else hidden states `[1, n, H]`.

    Raises:
        RemoteProtocolError: a token outside the vocabulary, a wrong number of bytes, values that are not finite.
    """
    if not isinstance(each.inputs, bytes):
        if min(each.inputs) < 0 or max(each.inputs) >= shape.vocab_size:
            raise RemoteProtocolError("tokens", "one outside the vocabulary", f"0..{shape.vocab_size - 1}")
        return torch.tensor([list(each.inputs)], device=device)
    expected_bytes = each.num_rows * shape.hidden_size * dtype.itemsize
    if len(each.inputs) != expected_bytes:
        raise RemoteProtocolError(
            "hidden states", f"{len(each.inputs)} bytes", f"{expected_bytes} bytes for {each.num_rows} nodes"
        )
    hidden = torch.frombuffer(bytearray(each.inputs), dtype=dtype).view(1, each.num_rows, shape.hidden_size)
    if not bool(torch.isfinite(hidden).all()):
        raise RemoteProtocolError("hidden states", "NaN or infinity", "finite values")
    return hidden.to(device)


def attends_by_kind(forward: Forward, layers: Sequence[LayerShape]) -> dict[str, NDArray[np.bool_]]:
    """Return for each kind of attention the slots that each node attends to, `[n, slots]`."""
    masks = {}
    for kind, window in {layer.kind: layer.window for layer in layers if layer.attends}.items():
        attends = forward.mask
        if window:
            attends = attends & (forward.positions[:, None] - forward.slot_positions[None] < window)
        masks[kind] = attends
    return masks


def split_hidden(hidden: torch.Tensor, ends: Sequence[int]) -> list[SpanOutput]:
    """Split hidden states `[n, H]` into one output for each pass. ends: the row after each pass's last one."""
    data = hidden.contiguous().cpu().view(torch.uint8).numpy()
    return [data[start:end].tobytes() for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def split_views(logits: torch.Tensor, counts: Sequence[int]) -> list[SpanOutput]:
    """Split `[sum of counts, V]` into one output per pass. Values that are not finite fail only their own pass."""
    is_finite = torch.isfinite(logits.amax(dim=-1)).tolist()
    return split_judged(logits, logits.argmax(dim=-1).tolist(), is_finite, counts)


def split_judged(
    logits: torch.Tensor, best: Sequence[TokenId], is_finite: Sequence[bool], counts: Sequence[int]
) -> list[SpanOutput]:
    """Split `[sum of counts, V]`. best: the likeliest token of each row. is_finite: whether its logits are."""
    rows = [LogitsRow(row, token) for row, token in zip(logits, best, strict=True)]
    outputs: list[SpanOutput] = []
    start = 0
    for count in counts:
        end = start + count
        outputs.append(
            rows[start:end]
            if all(is_finite[start:end])
            else ModelError("the target's logits are not finite: check weights and dtype")
        )
        start = end
    return outputs


class RunnableSpan:
    """What every way to run a span shares: inputs are checked pass by pass, and each pass gets an output or an error.

    A subclass sets `shape` and implements `_run`. grammars: compiles constraints for the model's tokens.
    """

    shape: ModelShape
    grammars: Grammars | None = None
    torch_dtype: torch.dtype = torch.float32
    _device = "cpu"

    @torch.inference_mode()
    def run(self, passes: Sequence[SpanPass]) -> list[SpanOutput]:
        """Run the span over the nodes of several sessions at once, and return one output per pass, in order.

        Each cache occurs once. The error of an invalid pass is its output.
        """
        outputs: list[SpanOutput] = []
        inputs: dict[int, torch.Tensor] = {}
        for index, each in enumerate(passes):
            outputs.append(b"")
            try:
                inputs[index] = read_inputs(each, self.shape, self.torch_dtype, self._device)
            except DsdError as exc:
                outputs[index] = exc
        for group in self._groups([*inputs]) if inputs else []:
            results = self._run([passes[index] for index in group], [inputs[index] for index in group])
            for index, result in zip(group, results, strict=True):
                outputs[index] = result
        return outputs

    def hidden(self, cache: Any, forward: Forward, inputs: Sequence[TokenId] | bytes) -> bytes:
        """Return the hidden states `[n, H]` after the span, row-major in the model's dtype.

        inputs: token ids at the head, else the hidden states from the stage before, in the same format.

        Raises:
            RemoteProtocolError: a token outside the vocabulary, a wrong number of bytes, values that are not finite.
        """
        return hidden_of(self.run([SpanPass(cache=cache, forward=forward, inputs=inputs)])[0])

    def views(
        self, cache: Any, forward: Forward, inputs: Sequence[TokenId] | bytes, rows: Sequence[int]
    ) -> list[LogitsRow]:
        """Run the span and return the target's view after each of `rows`. Only the tail can do this.

        Raises:
            RemoteProtocolError: see `hidden`.
            ModelError: the logits are not finite.
        """
        views = views_of(self.run([SpanPass(cache=cache, forward=forward, inputs=inputs, wanted=rows)])[0])
        return [view for view in views if isinstance(view, LogitsRow)]

    def _groups(self, indices: Sequence[int]) -> list[Sequence[int]]:
        """Return which passes run together."""
        return [indices]

    def _run(self, passes: Sequence[SpanPass], inputs: Sequence[torch.Tensor]) -> Sequence[SpanOutput]:
        """Run passes whose inputs, `[1, n]` or `[1, n, H]`, are valid."""
        raise NotImplementedError
