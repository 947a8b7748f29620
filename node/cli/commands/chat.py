"""Implements `dsd chat`: talk to a model through a gateway."""

import os
import sys

from rich.console import Console

from node.client.chat import HELP, Chat, typed_lines
from node.client.conversation import Conversation, GatewayClient
from node.config import ChatConfig
from node.paths import state_dir


def run(config: ChatConfig) -> int:
    """Chat until the user leaves or the input ends."""
    client = GatewayClient(config.gateway, config.key or os.environ.get("OPENAI_API_KEY", ""))
    try:
        conversation = Conversation(
            model=client.model(),
            system=config.system,
            seed=config.seed,
            temperature=config.temperature,
            max_tokens=config.max_tokens,
        )
        console = Console(highlight=False)
        if sys.stdin.isatty():
            console.print(f"{conversation.model} at {config.gateway}\n{HELP}", style="dim")
        Chat(client=client, conversation=conversation, console=console).run(typed_lines(state_dir() / "chat-history"))
    finally:
        client.close()
    return 0
