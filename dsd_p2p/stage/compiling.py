"""Bounds how many constraints a stage compiles at once, so that hostile ones leave threads for passes."""

import trio

from dsd_p2p.stage.span_model import SpanModel
from dsd_p2p.types import TextRequest

_compiling = trio.CapacityLimiter(2)


async def compile_constraint(model: SpanModel, text: TextRequest) -> None:
    """Compile the constraint of a request, if it has one, outside the loop and outside any pass.

    Raises:
        ConfigError: the constraint is wrong, or too large.
    """
    if text.constraint is not None and model.grammars is not None:
        grammar = model.grammars.grammar(text.constraint, text.stop_tokens)
        await trio.to_thread.run_sync(grammar.start, limiter=_compiling)
