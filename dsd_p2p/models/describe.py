"""Builds a peer's description of the layers that it serves."""

from dsd_p2p.models.architecture import ModelShape
from dsd_p2p.models.source import ModelSource
from dsd_p2p.types import PeerInfo, Span

_NAME_LENGTH = 128


def stage_info(
    source: ModelSource, dtype: str, shape: ModelShape, *, peer: str, addresses: tuple[str, ...], span: Span | None
) -> PeerInfo:
    """Return the description of `peer` when it serves `span`, or no layers yet.

    Raises:
        ConfigError: the dtype does not exist.
    """
    return PeerInfo(
        peer=peer,
        addresses=addresses,
        span=span,
        num_layers=shape.num_layers if span else 0,
        model_name=source.name[-_NAME_LENGTH:],
        model=source.key(dtype),
        max_positions=shape.max_positions,
    )
