"""Converts text to a model's tokens and back."""

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from dsd_p2p.errors import ConfigError, ModelError
from dsd_p2p.models.streamer import TextStreamer, decode
from dsd_p2p.types import Sampling, TokenId

_SANE_SAMPLING = Sampling(temperature=0.7, top_p=0.95)
"""For models whose files say nothing: with temperature 1, a small model soon writes nonsense."""

_Tokens = int | list[int] | None
Struct = TypeVar("Struct", bound=msgspec.Struct)


class _Settings(msgspec.Struct, frozen=True):
    """What we read of generation_config.json and config.json. Other fields can hold anything."""

    eos_token_id: _Tokens = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None


class _ModelConfig(msgspec.Struct, frozen=True):
    eos_token_id: _Tokens = None
    text_config: _Settings | None = None


class TextCodec:
    """A model's tokenizer, stop tokens and usual way to sample.

    folder: in transformers' format. Without a tokenizer in it, prompts can still be given as token ids.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tokenizer, self._why_not = load_tokenizer(folder)
        settings = _read(folder / "generation_config.json", _Settings)
        config = _read(folder / "config.json", _ModelConfig)
        own = getattr(self._tokenizer, "eos_token_id", None)
        inner = config.text_config or _Settings()
        named = (settings.eos_token_id, config.eos_token_id, inner.eos_token_id, own)
        # The files often disagree: one names the end of a text, another the end of a turn. Each is an end.
        self.stop_tokens = tuple(sorted({token for each in named for token in _listed(each)}))
        self.sampling = _sampling_of(settings)

    def encode(self, prompt: str, *, is_raw: bool) -> list[TokenId]:
        """Return the prompt's tokens, formatted with the model's chat template unless `is_raw`.

        Raises:
            ModelError: the model has no tokenizer, or no chat template.
        """
        if self._tokenizer is None:
            raise ModelError(f"{self._folder} has no tokenizer: give the prompt with --prompt-ids{self._why_not}")
        if is_raw:
            return list(self._tokenizer(prompt).input_ids)
        if not self._tokenizer.chat_template:
            raise ModelError(f"{self._folder} has no chat template: add --raw to continue the prompt as it is")
        return self.encode_chat([{"role": "user", "content": prompt}])

    @property
    def template(self) -> str:
        """The model's chat template, in Jinja; empty if it has none."""
        return str(getattr(self._tokenizer, "chat_template", None) or "")

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        template_values: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[TokenId]:
        """Return a conversation's tokens in the model's chat template, up to the start of the answer.

        messages: each has "role" and "content"; an assistant's can have "tool_calls".
        template_values: further values for the template, such as enable_thinking. tools: as OpenAI describes them, for
            a template that takes them.

        Raises:
            ModelError: the model has no tokenizer, or no chat template.
            ConfigError: the template rejects these messages.
        """
        if self._tokenizer is None or not self._tokenizer.chat_template:
            raise ModelError(f"{self._folder} has no chat template: it can only continue raw text")
        values = template_values or {}
        taken = set(values) & set(inspect.signature(self._tokenizer.apply_chat_template).parameters)
        if taken:
            raise ConfigError(f"chat_template_kwargs: {', '.join(sorted(taken))} cannot be set there")
        try:
            encoded = self._tokenizer.apply_chat_template(
                [self._for_template(message) for message in messages],
                **values,
                **({"tools": list(tools)} if tools else {}),
                add_generation_prompt=True,
                return_dict=True,
            )
        except Exception as exc:  # The template is the model's own code, in a sandbox.
            raise ConfigError(f"the model's chat template rejects these messages: {exc}") from exc
        return list(encoded["input_ids"])

    def token_text(self, token: TokenId) -> str:
        """Return the text of one token, even of a special one."""
        return "" if self._tokenizer is None else str(self._tokenizer.decode([token]))

    def decode(self, tokens: Sequence[TokenId]) -> str:
        """Return the text of `tokens` without special ones; empty if there is no tokenizer."""
        return "" if self._tokenizer is None else decode(self._tokenizer, list(tokens))

    def streamer(self) -> TextStreamer:
        """Return a decoder that takes tokens one by one."""
        return TextStreamer(self._tokenizer)

    def _for_template(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return the message as templates expect it: arguments as objects, calls in the text if it knows none."""
        calls = message.get("tool_calls")
        if not calls:
            return dict(message)
        functions = [{**call["function"], "arguments": _parsed(call["function"]["arguments"])} for call in calls]
        if "tool_calls" in str(self._tokenizer.chat_template):
            whole = [{**call, "function": function} for call, function in zip(calls, functions, strict=True)]
            return {**message, "tool_calls": whole}
        lines = [message.get("content") or "", *(json.dumps(function, ensure_ascii=False) for function in functions)]
        return {"role": message["role"], "content": "\n".join(filter(None, lines))}


def load_tokenizer(folder: Path) -> tuple[Any, str]:
    """Return the tokenizer, or None and why there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False), ""
    except Exception as exc:  # A tokenizer's files can fail in any way; prompts of token ids go on working.
        lines = str(exc).strip().splitlines()
        has_files = any(folder.glob("tokenizer*"))
        return None, f" (transformers cannot load its files: {lines[0]})" if lines and has_files else ""


def _read(path: Path, kind: type[Struct]) -> Struct:
    """Return what the file says, or the defaults if there is no such file.

    Raises:
        ModelError: it is not what transformers writes.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return kind()
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise ModelError(f"{path}: {exc}: fetch the model again") from exc


def _listed(tokens: _Tokens) -> list[int]:
    return [tokens] if isinstance(tokens, int) else list(tokens or ())


def _sampling_of(settings: _Settings) -> Sampling:
    """Return how the model's makers sample, or a sane way if they do not say."""
    if settings.do_sample is False and settings.temperature is None:
        return Sampling()
    if settings.temperature is None and settings.top_p is None and settings.top_k is None:
        return _SANE_SAMPLING
    temperature = 1.0 if settings.temperature is None else settings.temperature
    return Sampling(
        temperature=min(max(temperature, 0.0), 2.0),
        top_k=min(max(settings.top_k or 0, 0), 1 << 31),
        top_p=min(max(settings.top_p or 1.0, 1e-6), 1.0),
    )


def _parsed(arguments: Any) -> Any:
    """Return a call's arguments as an object, which templates write as they like; OpenAI's clients send them as text."""
    try:
        return json.loads(arguments)
    except (TypeError, ValueError):
        return arguments
