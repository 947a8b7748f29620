"""An answer as `dsd generate --json` prints it, and `dsd verify` reads it."""

import msgspec

from dsd_p2p.types import ModelKey, TextRequest, TokenId


class Asked(msgspec.Struct, kw_only=True):
    """What an answer is a function of: the model, its key, the prompt and the settings."""

    model: str
    key: ModelKey
    prompt_ids: list[TokenId]
    text: TextRequest


class WrittenAnswer(msgspec.Struct, kw_only=True):
    """What `dsd generate --json` prints. stats: see `AnswerStatistics.as_json`."""

    text: str
    token_ids: list[TokenId]
    asked: Asked
    stats: dict[str, object]
