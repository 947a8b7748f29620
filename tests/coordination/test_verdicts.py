"""Only the tail of the present route gives verdicts: no other stage can dictate text, or get the tail blamed."""

import pytest
import trio
from msgspec.structs import replace
from toy import VOCAB, plain_text
from toy_drafts import TREE
from toy_swarm import PROMPT, toy_swarm

from dsd_p2p.coordination.engine import GenerateOptions
from dsd_p2p.errors import RemoteProtocolError
from dsd_p2p.transport.memory import MemoryNetwork
from dsd_p2p.types import TextRequest
from dsd_p2p.window.static import StaticPolicy
from dsd_p2p.wire.codec import decode, encode
from dsd_p2p.wire.messages import Verdict

NUM_TOKENS = 60


@pytest.mark.parametrize("liar", ["stage0", "stage1"])
async def test_a_stage_that_is_not_the_tail_dictates_nothing(liar):
    """It copies the tail's next verdict, with other tokens, and sends it first."""
    network = MemoryNetwork()
    async with toy_swarm(network=network) as swarm:
        forged = []
        original = network.transports["stage2"].send

        async def send(to, frame):
            message = decode(frame).message
            if isinstance(message, Verdict) and message.start_pos > len(PROMPT) + 10 and not forged:
                forged.append(replace(message, tokens=tuple((token + 1) % VOCAB for token in message.tokens)))
                await network.transports[liar].send("coordinator", encode(forged[0]))
            await original(to, frame)

        network.transports["stage2"].send = send
        tokens = []
        options = GenerateOptions(text=TextRequest(max_tokens=NUM_TOKENS))
        error = None
        with trio.fail_after(30):
            try:
                async with swarm.engine.generate(PROMPT, options, StaticPolicy(TREE)) as generation:
                    async for token in generation:
                        tokens.append(token)
            except RemoteProtocolError as exc:
                error = exc
        assert forged
        # The only route is through the liar, so the request may end, but with no wrong token.
        assert tokens == plain_text(PROMPT, NUM_TOKENS)[: len(tokens)]
        assert error is None or "verdicts of the route's tail only" in str(error)
        assert len(tokens) == NUM_TOKENS or error is not None
