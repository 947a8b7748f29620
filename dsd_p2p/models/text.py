"""Between people's text and the model's tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from tokenizers.decoders import DecodeStream

from dsd_p2p.errors import ConfigError, ModelError
from dsd_p2p.types import TokenId


class TextCodec:
    """A model's tokenizer and stop tokens.

    folder: as transformers loads it. A folder without a tokenizer still takes prompts given as token ids.
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
        """Return the prompt's tokens, in the model's chat template unless `is_raw`.

        Raises:
            ModelError: the model has no tokenizer, or no chat template.
        """
        if self._tokenizer is None:
            raise ModelError(f"{self._folder} has no tokenizer: give the prompt as --prompt-ids")
        if is_raw:
            return list(self._tokenizer(prompt).input_ids)
        if not self._tokenizer.chat_template:
            raise ModelError(f"{self._folder} has no chat template: add --raw to continue the prompt as it is")
        return self.encode_chat([{"role": "user", "content": prompt}])

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[TokenId]:
        """Return a conversation's tokens in the model's chat template, up to where the answer begins.

        messages: each with "role" and "content".

        Raises:
            ModelError: the model has no tokenizer, or no chat template.
            ConfigError: the template does not take these messages.
        """
        if self._tokenizer is None or not self._tokenizer.chat_template:
            raise ModelError(f"{self._folder} has no chat template: it can only continue texts as they are")
        try:
            encoded = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True, return_dict=True
            )
        except (jinja2.TemplateError, TypeError, ValueError) as exc:
            raise ConfigError(f"the model's chat template does not take these messages: {exc}") from exc
        return list(encoded["input_ids"])

    def token_text(self, token: TokenId) -> str:
        """Return one token as text, special ones too."""
        return "" if self._tokenizer is None else str(self._tokenizer.decode([token]))

    def decode(self, tokens: Sequence[TokenId]) -> str:
        """Return the text of `tokens`, special ones left out; empty without a tokenizer."""
        return "" if self._tokenizer is None else str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def streamer(self) -> "TextStreamer":
        """Return a decoder for tokens that come one by one."""
        return TextStreamer(self._tokenizer)


class TextStreamer:
    """Turns tokens into text as soon as it is whole characters."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def step(self, token: TokenId) -> str:
        """Return the text that `token` completes, often a word, sometimes nothing."""
        if self._tokenizer is None:
            return ""
        return self._stream.step(self._tokenizer._tokenizer, token) or ""
