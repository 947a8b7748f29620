"""Giving a stage that lost its cache what the stage before it still has (docs/protocol.md, rule 9: Replay)."""

from dsd_p2p.errors import PeerDisconnected
from dsd_p2p.peers.links import PeerLinks
from dsd_p2p.stage.session import StageSession
from dsd_p2p.types import PeerId
from dsd_p2p.wire.messages import FILL_NODES, Window


async def refill(links: PeerLinks, session: StageSession, to: PeerId) -> None:
    """Send tokens and hidden states of everything given but the last token, as windows of the new epoch.

    Raises:
        PeerDisconnected: they are not kept here.
        PeerError: the stage cannot be reached.
    """
    opened, log = session.opened, session.held.log
    num_nodes = opened.num_given - 1
    if log is None or log.num_rows < num_nodes:
        raise PeerDisconnected("the hidden states for a refill are not kept here: send all of it again")
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
        await links.send(to, window, log.rows(start, positions[-1] + 1))


def ends_here(session: StageSession, window: Window) -> bool:
    """True when a window only refills us: the next stage has kept what it holds."""
    opened = session.opened
    is_given = window.epoch == opened.epoch and window.positions[-1] < opened.num_given - 1
    return is_given and session.place.next_is_kept
