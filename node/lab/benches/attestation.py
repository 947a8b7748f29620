"""Implements `dsd bench attest`: the cost of signing every window, relative to a stage's pass."""

import time

import torch

from dsd_p2p.cache.slots import SlotTable
from dsd_p2p.keys import SigningKey
from dsd_p2p.models.architecture import read_shape
from dsd_p2p.models.open import OpenSpan, open_span
from dsd_p2p.models.progress import Progress
from dsd_p2p.models.source import find_model
from dsd_p2p.placement.listed import even_spans
from dsd_p2p.types import Span
from dsd_p2p.wire.attest import hash_rows, signed_text
from dsd_p2p.wire.messages import Window
from node.lab.config import SplitConfig
from node.lab.receipt import print_table, sample

_CONTEXT = 128
_NODES = (1, 4, 8, 16)
_PASSES = 15


def run_attestation(config: SplitConfig, rounds: int, progress: Progress) -> dict[str, object]:
    """Time a middle stage's passes and the hashing and signing of their rows, in turns.

    Raises:
        ModelError: the model cannot be loaded.
    """
    torch.set_num_threads(config.threads)
    source = find_model(config.model, progress)
    num_layers = read_shape(source.folder).num_layers
    span = Span(*even_spans(num_layers, config.stages)[config.stages // 2])
    model = open_span(source, span, dtype=config.dtype, device=config.device)
    key = SigningKey(bytes(32))
    shares = {}
    for num_nodes in _NODES:
        pairs = [_measure(model, span, key, num_nodes) for _ in range(rounds)]
        shares[str(num_nodes)] = {
            "pass_ms": sample([pass_s * 1e3 for pass_s, _ in pairs]),
            "attest_ms": sample([attest_s * 1e3 for _, attest_s in pairs]),
            "share": sample([attest_s / pass_s for pass_s, attest_s in pairs]),
        }
    rows = [
        (n, *(f"{row[name].median:.3f}" for name in ("pass_ms", "attest_ms")), f"{row['share'].median:.2%}")
        for n, row in shares.items()
    ]
    print_table(("nodes", "pass, ms", "hash and sign, ms", "share"), rows)
    return {"model": config.model, "span": str(span), "dtype": config.dtype, "nodes": shares}


def _measure(model: OpenSpan, span: Span, key: SigningKey, num_nodes: int) -> tuple[float, float]:
    """Return the seconds of `_PASSES` passes and the seconds of attesting them."""
    slots, cache = SlotTable(), model.new_cache(_CONTEXT + _PASSES * num_nodes)
    rows = bytes(_CONTEXT * model.row_bytes)
    model.hidden(cache, slots.chain(_CONTEXT), rows)
    pass_s = attest_s = 0.0
    for number in range(_PASSES):
        first = _CONTEXT + number * num_nodes
        nodes = range(first, first + num_nodes)
        forward = slots.append(nodes, [node - 1 for node in nodes], nodes)
        inputs = bytes(num_nodes * model.row_bytes)
        window = Window(
            session=bytes(8),
            epoch=0,
            window=number,
            root=(0, 0),
            first_node=first,
            tokens=(1,) * num_nodes,
            parents=tuple(node - 1 for node in nodes),
            positions=tuple(nodes),
        )
        start_s = time.perf_counter()
        outputs = model.hidden(cache, forward, inputs)
        middle_s = time.perf_counter()
        signed = hash_rows(inputs, model.row_bytes), hash_rows(outputs, model.row_bytes)
        key.sign(signed_text(window, span, *signed))
        pass_s += middle_s - start_s
        attest_s += time.perf_counter() - middle_s
    cache.free()
    return pass_s / _PASSES, attest_s / _PASSES
