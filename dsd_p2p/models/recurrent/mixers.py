"""Lets transformers' recurrent layers run over trees: replaces the two functions in them that look along the text.

How it works. A recurrent layer of any family is a module whose `forward` calls a causal convolution, then a scan;
projections, gates and norms work row by row. `bind_mixers` gives such a module a copy of its own `forward` in which
these two names mean ours. Ours run each session's rows along their paths, with what its cache keeps. There is no table
of families: a `forward` that calls an unknown scan is refused.
"""

import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from dsd_p2p.errors import ModelError
from dsd_p2p.models.ragged import running_segments
from dsd_p2p.models.recurrent.linear import LinearTerms, scan_linear
from dsd_p2p.models.recurrent.stepped import SteppedTerms, scan_stepped

_CONV = "causal_conv1d_fn"
_Result = tuple[torch.Tensor, torch.Tensor]
"""A scan's output, and an empty tensor for the state after it, which stays ours."""


def bind_mixers(model: Any) -> None:
    """Make every recurrent layer of a model look along paths.

    Raises:
        ModelError: a layer's recurrence is of an unknown kind.
    """
    for module in model.modules():
        _bind(module, model.config.model_type)


def _bind(module: Any, family: str) -> None:
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    if code is None or "update_conv_state" not in code.co_names or not hasattr(module, "layer_idx"):
        return
    scan = next((name for name in _SCANS if name in code.co_names), None)
    if scan is None and "update_recurrent_state" in code.co_names:
        raise ModelError(f"{family}: the recurrence of {type(module).__name__} is not supported")
    layer = int(module.layer_idx)
    own: dict[str, Any] = {_CONV: _convolution(layer)}
    if scan is not None:
        own[scan] = _SCANS[scan](layer, list(inspect.signature(forward.__globals__[scan]).parameters))
    copied = types.FunctionType(
        code, {**forward.__globals__, **own}, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copied.__kwdefaults__ = forward.__kwdefaults__
    module.forward = types.MethodType(copied, module)


def _convolution(layer: int) -> Callable[..., torch.Tensor]:
    def convolve(
        hidden: torch.Tensor, weight: torch.Tensor, bias: Any = None, activation: str | None = None, **_: Any
    ) -> torch.Tensor:
        """Return the causal convolution along each row's path. hidden: `[1, channels, sum n]`. weight: `[channels, K]`."""
        rows, width = hidden[0].T, weight.shape[-1]
        inputs = []
        for each in running_segments():
            memory = each.memory.layer(layer)
            own = rows[each.start : each.end]
            tail = memory.start_tail(own, width)
            stored = torch.cat([tail, memory.write("conv", own, each.paths.num_old)])
            # The path's slots are numbered from the tail's end; it has one input less than the window is wide.
            inputs.append(stored[each.paths.last(width) - 1])
        output = (torch.cat(inputs).float() * weight.T.float()).sum(1)
        if bias is not None:
            output = output + bias.float()
        if activation is not None:
            output = ACT2FN[activation](output)
        return output.to(hidden.dtype).T[None]

    return convolve


def _delta_rule(layer: int, names: list[str]) -> Callable[..., _Result]:
    """Gated delta net (Qwen3-Next, Qwen3.5, OLMo hybrid) and Kimi's delta attention."""

    def scan(*given: Any, **named: Any) -> _Result:
        arguments = dict(zip(names, given, strict=False)) | named
        query, key, value, decay, beta = _rows(arguments, "query", "key", "value", "g", "beta")
        heads = value.shape[1]
        terms = LinearTerms(
            query=_unit(query, heads) * query.shape[-1] ** -0.5,
            key=key,
            value=value.float(),
            decay=decay.float(),
            beta=beta.float(),
            widen=lambda stored: _unit(stored, heads),
        )
        return _result(_along_paths(layer, scan_linear, terms).to(value.dtype))

    return scan


def _mamba2(layer: int, names: list[str]) -> Callable[..., _Result]:
    """Mamba 2. `dt` is always clamped, as transformers does with prompts; it forgets to when it decodes."""

    def scan(*given: Any, **named: Any) -> _Result:
        arguments = dict(zip(names, given, strict=False)) | named
        x, dt, b, c = _rows(arguments, "hidden_states", "dt", "B", "C")
        heads, original = x.shape[1], x.dtype
        x, dt = x.float(), _time_steps(dt, arguments).float()
        terms = LinearTerms(
            query=_widen(c, heads),
            key=b,
            value=x * dt[..., None],
            decay=arguments["A"].float() * dt,
            beta=None,
            widen=lambda stored: _widen(stored, heads),
        )
        output = _along_paths(layer, scan_linear, terms) + x * arguments["D"].float()[:, None]
        return _result(output.to(original))

    return scan


def _mamba1(layer: int, names: list[str]) -> Callable[..., _Result]:
    """Mamba 1. Its tensors lie `[1, channels, n]`."""

    def scan(*given: Any, **named: Any) -> _Result:
        arguments = dict(zip(names, given, strict=False)) | named
        x, dt, b, c = (each.T for each in _rows(arguments, "hidden_states", "dt", "B", "C"))
        original = x.dtype
        if (bias := arguments.get("delta_bias")) is not None:
            dt = dt + bias.to(dt.dtype)
        if arguments.get("delta_softplus"):
            dt = nn.functional.softplus(dt)
        terms = SteppedTerms(x=x.float(), dt=dt.float(), b=b.float(), c=c.float(), a=arguments["A"].float())
        output = _along_paths(layer, scan_stepped, terms)
        if (skip := arguments.get("D")) is not None:
            output = output + terms.x * skip.float()
        if (gate := arguments.get("z")) is not None:
            output = output * nn.functional.silu(gate[0].T.float())
        return _result(output.to(original).T)

    return scan


_SCANS: Mapping[str, Callable[[int, list[str]], Callable[..., _Result]]] = {
    "torch_chunk_gated_delta_rule": _delta_rule,
    "chunk_kimi_delta_attention": _delta_rule,
    "mamba2_chunk_scan": _mamba2,
    "mamba_selective_scan": _mamba1,
}
"""By the name of transformers' function for several positions."""


def _rows(arguments: Mapping[str, Any], *names: str) -> list[torch.Tensor]:
    """Return these arguments without their batch dimension, which is 1: all sessions' rows lie in one."""
    return [arguments[name][0] for name in names]


def _along_paths(layer: int, scan: Callable[..., torch.Tensor], terms: Any) -> torch.Tensor:
    """Run the scan for each session; return its outputs, `[sum n, ...]`."""
    return torch.cat(
        [scan(each.memory.layer(layer), each.paths, terms.part(each.start, each.end)) for each in running_segments()]
    )


def _result(output: torch.Tensor) -> _Result:
    return output[None], output.new_empty(0)


def _time_steps(dt: torch.Tensor, arguments: Mapping[str, Any]) -> torch.Tensor:
    if (bias := arguments.get("dt_bias")) is not None:
        dt = dt + bias.to(dt.dtype)
    if arguments.get("dt_softplus"):
        dt = nn.functional.softplus(dt)
    return dt.clamp(*(arguments.get("dt_limit") or (0.0, float("inf"))))


def _widen(stored: torch.Tensor, heads: int) -> torch.Tensor:
    """Give each of `heads` heads its group's row: `[n, groups, dk]` to float32 `[n, heads, dk]`."""
    return stored.float().repeat_interleave(heads // stored.shape[1], dim=1)


def _unit(stored: torch.Tensor, heads: int) -> torch.Tensor:
    """Widen rows and scale them to length 1."""
    rows = stored.float()
    return _widen(rows * torch.rsqrt((rows * rows).sum(-1, keepdim=True) + 1e-6), heads)
