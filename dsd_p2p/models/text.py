"""Converts text to a model's tokens and back."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from tokenizers.decoders import DecodeStream

from dsd_p2p.errors import ConfigError, ModelError
from dsd_p2p.types import TokenId


class TextCodec:
    """A model's tokenizer and stop tokens.

    folder: in transformers' format. Without a tokenizer in it, prompts can still be given as token ids.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig

        self._folder = folder
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self._tokenizer = None
        try:
            settings = GenerationConfig.from_pretrained(folder, local_files_only=True)
        except OSError:
            settings = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
        stop = getattr(settings, "eos_token_id", None)
        self.stop_tokens = tuple(sorted({stop} if isinstance(stop, int) else set(stop or ())))

    def encode(self, prompt: str, *, is_raw: bool) -> list[TokenId]:
        """Return the prompt's tokens, formatted with the model's chat template unless `is_raw`.

        Raises:
            ModelError: the model has no tokenizer, or no chat template.
        """
        if self._tokenizer is None:
            raise ModelError(f"{self._folder} has no tokenizer: give the prompt with --prompt-ids")
        if is_raw:
            return list(self._tokenizer(prompt).input_ids)
        if not self._tokenizer.chat_template:
            raise ModelError(f"{self._folder} has no chat template: add --raw to continue the prompt as it is")
        return self.encode_chat([{"role": "user", "content": prompt}])

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[TokenId]:
        """Return a conversation's tokens in the model's chat template, up to the start of the answer.

        messages: each has "role" and "content".

        Raises:
            ModelError: the model has no tokenizer, or no chat template.
            ConfigError: the template rejects these messages.
        """
        if self._tokenizer is None or not self._tokenizer.chat_template:
            raise ModelError(f"{self._folder} has no chat template: it can only continue raw text")
        try:
            encoded = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True, return_dict=True
            )
        except (jinja2.TemplateError, TypeError, ValueError) as exc:
            raise ConfigError(f"the model's chat template rejects these messages: {exc}") from exc
        return list(encoded["input_ids"])

    def token_text(self, token: TokenId) -> str:
        """Return the text of one token, even of a special one."""
        return "" if self._tokenizer is None else str(self._tokenizer.decode([token]))

    def decode(self, tokens: Sequence[TokenId]) -> str:
        """Return the text of `tokens` without special ones; empty if there is no tokenizer."""
        return "" if self._tokenizer is None else str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def streamer(self) -> "TextStreamer":
        """Return a decoder that takes tokens one by one."""
        return TextStreamer(self._tokenizer)


class TextStreamer:
    """A decoder that returns text as soon as the tokens form whole characters."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def step(self, token: TokenId) -> str:
        """Return the text that `token` completes, often a word, sometimes nothing."""
        if self._tokenizer is None:
            return ""
        return self._stream.step(self._tokenizer._tokenizer, token) or ""
