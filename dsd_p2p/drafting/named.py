"""Makes drafters by name."""

from dsd_p2p.drafting.base import Drafter
from dsd_p2p.drafting.combined import CombinedDrafter
from dsd_p2p.drafting.model import ModelDrafter
from dsd_p2p.drafting.ngram import NgramDrafter
from dsd_p2p.drafting.shadow import make_shadow
from dsd_p2p.errors import ConfigError
from dsd_p2p.models.architecture import read_shape
from dsd_p2p.models.catalog import CATALOG
from dsd_p2p.models.open import open_span
from dsd_p2p.models.progress import Progress
from dsd_p2p.models.source import ModelSource, find_model
from dsd_p2p.types import Span


def make_drafter(
    name: str, target: ModelSource, progress: Progress, *, model: str, dtype: str = "float32", device: str = "cpu"
) -> Drafter:
    """Return the named drafter with its model loaded.

    name: "ngram", "shadow" or a model, the latter two also with "+ngram"; or "auto", the drafter that benchmarked
    fastest for this target. model: the target's name in the catalog.

    Raises:
        ConfigError: the drafter's vocabulary differs from the target's, or something other than "+ngram" was added.
        ModelError: the drafter's weights cannot be loaded.
    """
    if name == "auto":
        name = CATALOG[model].drafter if model in CATALOG else "ngram"
    if name == "ngram":
        return NgramDrafter()
    drafting_model, _, lookup = name.partition("+")
    if lookup not in ("", "ngram"):
        raise ConfigError(f"drafter {name!r}: only +ngram can follow a model's name")
    drafter = _model_drafter(drafting_model, target, progress, dtype, device)
    return CombinedDrafter(drafter) if lookup else drafter


def _model_drafter(name: str, target: ModelSource, progress: Progress, dtype: str, device: str) -> Drafter:
    shape = read_shape(target.folder)
    if name == "shadow":
        progress.step("load drafter shadow", 0, 0)
        return make_shadow(target, shape.num_layers)
    source = find_model(name, progress)
    progress.step(f"load drafter {name}", 0, 0)
    num_layers = read_shape(source.folder).num_layers
    model = open_span(source, Span(0, num_layers), dtype=dtype, device=device)
    if model.shape.vocab_size != shape.vocab_size:
        raise ConfigError(
            f"drafter {name}: expected the target's {shape.vocab_size} tokens, got {model.shape.vocab_size}; "
            "choose a drafter with the target's tokenizer"
        )
    return ModelDrafter(model, name)
