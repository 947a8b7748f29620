"""Tries a model's family before its weights are read: is it exact when it is split and speculated upon?

How it works. The config is shrunk (`dsd_p2p.models.shrink`), a model with random weights is made of it, saved, and
loaded as two stages. Two sessions run through both stages together: a prompt, a tree window, a commit that moves slots,
and one more token. Each node's logits are compared with those of the whole model, which gets the node's path as plain
text. If that fails, the same is tried with one session at a time. The outcome is remembered by the config's digest.
"""

import functools
import hashlib
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from dsd_p2p.cache.passes import SpanPass, hidden_of, views_of
from dsd_p2p.cache.slots import Forward, SlotTable
from dsd_p2p.errors import DsdError, ModelError
from dsd_p2p.models.architecture import check_config, shape_of
from dsd_p2p.models.cache_dir import default_cache_dir
from dsd_p2p.models.loader import load_span
from dsd_p2p.models.packed import can_pack, pack_linear_layers
from dsd_p2p.models.rows import LogitsRow
from dsd_p2p.models.shrink import VOCAB, shrink
from dsd_p2p.models.source import ModelSource
from dsd_p2p.models.span import PassOrder, SpanModel
from dsd_p2p.types import Span

_LENGTHS = (20, 11)
_PARENTS = (None, None, 100, 100, 101, 102, 104, 105, 105)
_DEPTHS = (0, 0, 1, 1, 1, 2, 2, 3, 3)
_COMMITTED = (100, 103)
"""Each session's prompt, and the tree that follows it: the nodes are 100 to 108, the path to 103 is committed."""

_MAX_ERROR = 1e-3
"""In standard deviations of the logits. Rounding stays below 1e-5; another text starts near 1e-1."""


def pass_order(config: Any) -> PassOrder:
    """Return whether this model's layers can take several sessions in one pass.

    Raises:
        ModelError: the family cannot be split exactly.
    """
    check_config(config)
    shape_of(config)
    path = default_cache_dir() / "families" / _digest(config)
    try:
        return PassOrder(path.read_text())
    except (OSError, ValueError):
        order = try_family(config)
    # A refusal is not remembered: it can have a cause that goes away, such as a full disk.
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as scratch:
            scratch.write(order)
        Path(scratch.name).replace(path)
    except OSError:
        pass  # Nothing is lost but half a second next time.
    return order


def try_family(config: Any) -> PassOrder:
    """Split a tiny random model of this config, compare it with the whole, and return how its layers have to run.

    config: transformers' config of a text model, of any size.

    Raises:
        ModelError: the split model is not exact.
    """
    family = config.model_type
    problem = ""
    # Recurrent layers have no eager attention to fall back to.
    for order in [PassOrder.TOGETHER] if shape_of(config).is_recurrent else PassOrder:
        try:
            problem = _try(shrink(config), order)
        except DsdError:
            raise
        except Exception as exc:  # The family's own code, run in a way that it was not written for.
            first_line = str(exc).strip().partition("\n")[0]
            problem = f"this model family is not supported ({type(exc).__name__}: {first_line})"
        if not problem:
            return order
    raise ModelError(f"{family}: {problem}")


def _digest(config: Any) -> str:
    """Return a digest of everything that the outcome depends on: the config, the libraries and this package's code."""
    fields = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    versions = (transformers.__version__, torch.__version__, _code_digest())
    text = repr((versions, sorted(fields.items(), key=lambda each: each[0])))
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def _code_digest() -> str:
    code = (path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py")))
    return hashlib.sha256(b"".join(code)).hexdigest()


class _TinySource(ModelSource):
    """A model that was written a moment ago, so nothing on disk needs to be compared with it."""

    def check(self, tensors: object) -> None:
        """Do nothing."""


def _try(config: Any, order: PassOrder) -> str:
    """Return what is wrong with the split model, or an empty string."""
    random_state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        whole = random_model(config)
    finally:
        torch.set_rng_state(random_state)
    num_layers = shape_of(whole.config).num_layers
    with tempfile.TemporaryDirectory() as folder:
        transformers_logging.disable_progress_bar()
        whole.save_pretrained(folder)
        source = _TinySource(config.model_type, Path(folder))
        cut = num_layers // 2
        stages = [_stage(source, span, order) for span in (Span(0, cut), Span(cut, num_layers))]
    return _Trial(whole, stages).run()


def random_model(config: Any) -> Any:
    """Return a model whose hidden states have about unit size, so that every part of it shows in the logits."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.get_input_embeddings().weight.normal_()
    return model


def _stage(source: ModelSource, span: Span, order: PassOrder) -> SpanModel:
    loaded = load_span(source, span, torch.float32, "cpu")
    if can_pack(torch.float32, "cpu"):
        pack_linear_layers(loaded.model)
    return SpanModel(loaded, order)


class _Trial:
    """Two sessions on two stages beside the whole model."""

    def __init__(self, whole: Any, stages: Sequence[SpanModel]) -> None:
        self._whole = whole
        self._stages = stages
        rng = np.random.default_rng(0)
        self._texts = [rng.integers(3, VOCAB, length).tolist() for length in _LENGTHS]
        self._nodes = [rng.integers(3, VOCAB, len(_DEPTHS)).tolist() for _ in _LENGTHS]
        self._tables = [[SlotTable() for _ in _LENGTHS] for _ in stages]
        self._caches = [[stage.new_cache(64) for _ in _LENGTHS] for stage in stages]
        self._worst = 0.0

    def run(self) -> str:
        """Return what is wrong, or an empty string."""
        texts, nodes = self._texts, self._nodes
        rows = self._window(
            [[table.chain(len(text)) for table, text in zip(tables, texts, strict=True)] for tables in self._tables],
            texts,
            [[len(text) - 1] for text in texts],
        )
        for views, text in zip(rows, texts, strict=True):
            self._compare(views[0], text)
        self._settle([len(text) - 1 for text in texts])
        rows = self._window(
            [self._tree(tables) for tables in self._tables], nodes, [range(len(_DEPTHS)) for _ in texts]
        )
        for views, text, tokens in zip(rows, texts, nodes, strict=True):
            for index, view in enumerate(views):
                self._compare(view, [*text, *_path(tokens, index)])
        self._settle([_COMMITTED[-1]] * len(texts))
        rows = self._window([self._next(tables) for tables in self._tables], [[7], [9]], [[0], [0]])
        for views, text, tokens, last in zip(rows, texts, nodes, (7, 9), strict=True):
            self._compare(views[0], [*text, *(tokens[node - 100] for node in _COMMITTED), last])
        if not self._worst < _MAX_ERROR:
            return (
                "this model family is not supported, because its split layers do not compute what the whole model does"
            )
        return self._problem_of_caches()

    def _tree(self, tables: Sequence[SlotTable]) -> list[Forward]:
        return [
            table.append(range(100, 100 + len(_DEPTHS)), _PARENTS, [len(text) + depth for depth in _DEPTHS])
            for table, text in zip(tables, self._texts, strict=True)
        ]

    def _next(self, tables: Sequence[SlotTable]) -> list[Forward]:
        return [
            table.append([200], [None], [len(text) + len(_COMMITTED)])
            for table, text in zip(tables, self._texts, strict=True)
        ]

    def _window(
        self, forwards: Sequence[Sequence[Forward]], tokens: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]
    ) -> list[list[LogitsRow]]:
        """Take one window of each session through both stages; return the views after the wanted rows."""
        head, tail = self._stages
        hidden = head.run(
            [
                SpanPass(cache=cache, forward=forward, inputs=inputs)
                for cache, forward, inputs in zip(self._caches[0], forwards[0], tokens, strict=True)
            ]
        )
        outputs = tail.run(
            [
                SpanPass(cache=cache, forward=forward, inputs=hidden_of(output), wanted=rows)
                for cache, forward, output, rows in zip(self._caches[1], forwards[1], hidden, wanted, strict=True)
            ]
        )
        return [[view for view in views_of(output) if isinstance(view, LogitsRow)] for output in outputs]

    def _settle(self, nodes: Sequence[int]) -> None:
        for tables, caches in zip(self._tables, self._caches, strict=True):
            for table, cache, node in zip(tables, caches, nodes, strict=True):
                edit = table.settle(node)
                if edit is not None:
                    cache.edit(edit)

    def _compare(self, view: LogitsRow, path: Sequence[int]) -> None:
        with torch.inference_mode():
            expected = self._whole(torch.tensor([list(path)]), use_cache=False).logits[0, -1]
        error = float((view.row - expected).abs().max() / expected.std())
        self._worst = max(self._worst, error) if error == error else float("inf")

    def _problem_of_caches(self) -> str:
        for cache in itertools.chain(*self._caches):
            if cache.allocated_bytes > cache.num_bytes:
                return (
                    f"its layers keep {cache.allocated_bytes} bytes in the cache where {cache.num_bytes} were expected; "
                    "this model family is not supported"
                )
        return ""


def _path(tokens: Sequence[int], index: int) -> list[int]:
    """Return the tokens from the tree's root to this node."""
    path: list[int] = []
    at: int | None = 100 + index
    while at is not None:
        path.insert(0, tokens[at - 100])
        at = _PARENTS[at - 100]
    return path
