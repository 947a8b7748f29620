"""Refills a stage that lost its cache, from what the stage before it kept (docs/protocol.md, rule 9: Replay)."""

from dsd_p2p.errors import PeerDisconnected
from dsd_p2p.peers.links import PeerLinks
from dsd_p2p.stage.session import StageSession
from dsd_p2p.types import PeerId
from dsd_p2p.wire.messages import FILL_NODES, Window


async def refill(links: PeerLinks, session: StageSession, to: PeerId) -> None:
    """Send the tokens and hidden states of all given tokens but the last, as windows of the new epoch.

    Raises:
        PeerDisconnected: we do not have all of them.
        PeerError: the stage cannot be reached.
    """
    opened, log = session.opened, session.held.log
    num_nodes = opened.num_given - 1
    if log is None or log.num_rows < num_nodes:
        raise PeerDisconnected("this stage no longer has the hidden states for a refill: send the whole text again")
    for number, start in enumerate(range(0, num_nodes, FILL_NODES)):
        positions = tuple(range(start, min(start + FILL_NODES, num_nodes)))
        window = Window(
            session=opened.session,
            epoch=opened.epoch,
            window=number,
            root=(opened.epoch, start - 1),
            first_node=start,
            tokens=log.tokens(start, positions[-1] + 1),
            parents=tuple(position - 1 for position in positions),
            positions=positions,
        )
        await links.send(to, window, log.rows(slice(start, positions[-1] + 1)))


def ends_here(session: StageSession, window: Window) -> bool:
    """Return whether a window only refills us and is not sent on, because the next stage kept its cache."""
    opened = session.opened
    is_given = window.epoch == opened.epoch and window.positions[-1] < opened.num_given - 1
    return is_given and session.place.next_is_kept
