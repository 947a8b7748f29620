"""Implements `dsd bench forms`: how near a model's forms in memory are to its floats, their size, and the time to load."""

import time

import msgspec
import torch

from dsd_p2p.models.architecture import read_shape
from dsd_p2p.models.lean.open import open_lean_span
from dsd_p2p.models.lean.quality import judge, log_probabilities
from dsd_p2p.models.open import open_span
from dsd_p2p.models.progress import Progress
from dsd_p2p.models.source import find_model
from dsd_p2p.models.span import SpanModel
from dsd_p2p.models.text import TextCodec
from dsd_p2p.types import INT8, STORED, Span
from node.lab.config import FormsConfig
from node.lab.quality.texts import JUDGED, texts_of
from node.lab.receipt import print_table


def run_forms(config: FormsConfig, progress: Progress) -> dict[str, object]:
    """Compare int8 and the stored form with float32, on the model's own answers and on prose.

    Raises:
        ModelError: the model cannot be loaded, or its family has no such forms.
    """
    torch.set_num_threads(config.threads)
    source = find_model(config.model, progress)
    whole = Span(0, read_shape(source.folder).num_layers)
    progress.step("what the float32 model says", 0, 0)
    stock = open_span(source, whole)
    assert isinstance(stock, SpanModel)
    texts = texts_of(stock, TextCodec(source.folder), JUDGED)
    expected = [log_probabilities(stock, text) for text in texts]
    results: dict[str, object] = {"float32": {"weights_mb": stock.weight_bytes / 1e6}}
    del stock
    rows = []
    for form in (INT8, STORED):
        progress.step(f"judge {form}", 0, 0)
        start_s = time.perf_counter()
        model = open_lean_span(source, whole, cache_bytes=1 << 40, is_stored=form == STORED)
        load_s = time.perf_counter() - start_s
        quality, size = judge(model, texts, expected), model.weight_bytes / 1e6
        del model
        results[form] = msgspec.to_builtins(quality) | {"weights_mb": size, "load_s": load_s}
        rows.append(
            (form, f"{size:,.0f}", f"{quality.agreement:.3f}", f"{quality.kl:.4f}", f"{quality.perplexity_growth:+.1%}")
        )
    print_table((config.model, "weights, MB", "same token", "KL, nats", "perplexity"), rows)
    return {"model": config.model, "judged_on": msgspec.to_builtins(JUDGED), **results}
