"""Makes the shadow: a drafter of the target's own weights in int8, for targets that have no small sibling."""

from contextlib import suppress

import torch

from dsd_p2p.drafting.model import ModelDrafter
from dsd_p2p.errors import ModelError
from dsd_p2p.models.architecture import read_model_config
from dsd_p2p.models.families import pass_order
from dsd_p2p.models.int8 import round_linear_layers
from dsd_p2p.models.lean.open import open_lean_span
from dsd_p2p.models.loader import load_span
from dsd_p2p.models.source import ModelSource
from dsd_p2p.models.span import SpanModel
from dsd_p2p.types import Span


def make_shadow(target: ModelSource, num_layers: int) -> ModelDrafter:
    """Return a drafter made of the target's weights, rounded to int8 per channel.

    No kernel for 4 to 6 bits is faster on a CPU, and int8 agrees with the target more often at the same cost. Families
    without a lean form run transformers' own layers with rounded weights.

    Raises:
        ModelError: the weights cannot be loaded.
    """
    whole = Span(0, num_layers)
    with suppress(ModelError):
        return ModelDrafter(open_lean_span(target, whole, is_exact=False), "shadow")
    model = SpanModel(load_span(target, whole, torch.float32, "cpu"), pass_order(read_model_config(target.folder)))
    round_linear_layers(model.model)
    return ModelDrafter(model, "shadow")


def shadow_bytes(target: ModelSource) -> int:
    """Return the memory that making the shadow takes: float32 weights, and the same in int8."""
    return 5 * target.num_params()
