"""Makes drafters by name."""

from contextlib import suppress

from dsd_p2p.drafting.base import Drafter
from dsd_p2p.drafting.combined import CombinedDrafter
from dsd_p2p.drafting.model import ModelDrafter
from dsd_p2p.drafting.ngram import NgramDrafter
from dsd_p2p.drafting.shadow import make_shadow
from dsd_p2p.drafting.siblings import check_vocabulary
from dsd_p2p.errors import ConfigError, ModelError
from dsd_p2p.models.architecture import read_shape
from dsd_p2p.models.device import device_type
from dsd_p2p.models.lean.open import open_lean_span
from dsd_p2p.models.open import OpenSpan, open_span
from dsd_p2p.models.progress import Progress
from dsd_p2p.models.source import ModelSource, find_model
from dsd_p2p.types import Span

LOOKUP = NgramDrafter()
"""Prompt lookup, which is always there."""


def make_drafter(
    name: str, target: ModelSource, progress: Progress, *, dtype: str = "auto", device: str = "cpu"
) -> Drafter:
    """Return the named drafter with its model loaded.

    name: "ngram", "shadow" or a model, the latter two also with "+ngram". dtype: of a drafting model: see `open_span`;
        "auto": int8 if it can be.

    Raises:
        ConfigError: the drafter's tokenizer differs from the target's, or something other than "+ngram" was added.
        ModelError: the drafter's weights cannot be loaded.
    """
    if name == LOOKUP.name:
        return LOOKUP
    drafting_model, lookup = split_name(name)
    drafter = _model_drafter(drafting_model, target, progress, dtype, device)
    return CombinedDrafter(drafter) if lookup else drafter


def split_name(name: str) -> tuple[str, bool]:
    """Return the drafting model of a drafter's name, and whether prompt lookup is added.

    Raises:
        ConfigError: something other than "+ngram" was added.
    """
    model, _, lookup = name.partition("+")
    if lookup not in ("", LOOKUP.name):
        raise ConfigError(f"drafter {name!r}: only +{LOOKUP.name} can follow a model's name")
    return model, bool(lookup)


def _model_drafter(name: str, target: ModelSource, progress: Progress, dtype: str, device: str) -> Drafter:
    shape = read_shape(target.folder)
    if name == "shadow":
        progress.step("load drafter shadow", 0, 0)
        return make_shadow(target, shape.num_layers)
    source = find_model(name, progress)
    progress.step(f"load drafter {name}", 0, 0)
    check_vocabulary(target.folder, source.folder, name)
    return ModelDrafter(_open_whole(source, dtype, device), name, shape.vocab_size)


def _open_whole(source: ModelSource, dtype: str, device: str) -> OpenSpan:
    """Open a whole drafting model. "auto" is int8 on a CPU where the model allows it: no draft changes the text."""
    whole = Span(0, read_shape(source.folder).num_layers)
    if dtype != "auto":
        return open_span(source, whole, dtype=dtype, device=device)
    if device_type(device) != "cpu":
        return open_span(source, whole, dtype="bfloat16", device=device)
    with suppress(ModelError):
        return open_lean_span(source, whole, is_exact=False)
    return open_span(source, whole)
