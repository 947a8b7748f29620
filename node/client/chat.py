"""A chat in the terminal: reads questions, obeys commands that begin with a slash, and shows answers as they arrive."""

import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console
from rich.text import Text

from dsd_p2p.errors import DsdError
from node.client.conversation import Conversation, GatewayClient

HELP = """\
/new            forget what was said
/retry          answer the last question again
/system TEXT    give instructions; without TEXT, take them back
/seed NUMBER    the same seed gives the same answer; without NUMBER, another one each time
/temperature X  0 is the likeliest answer; without X, the model's own
/help           show this
/quit           leave; so does Ctrl-D
Alt-Enter begins a new line. Ctrl-C stops an answer."""


@dataclass(slots=True, kw_only=True)
class Chat:
    """One chat."""

    client: GatewayClient
    conversation: Conversation
    console: Console
    _commands: dict[str, Callable[[str], str]] = field(init=False)

    def __post_init__(self) -> None:
        self._commands = {
            "new": self._new,
            "system": self._system,
            "seed": self._seed,
            "temperature": self._temperature,
            "help": lambda _words: HELP,
        }

    def run(self, lines: Iterator[str]) -> None:
        """Answer each line until they end or the user leaves."""
        for line in lines:
            if not line.strip():
                continue
            if not line.startswith("/"):
                self._answer(line)
                continue
            name, _, words = line[1:].strip().partition(" ")
            if name in ("quit", "exit"):
                return
            self._obey(name, words.strip())

    def _obey(self, name: str, words: str) -> None:
        if name == "retry":
            question = self.conversation.take_back()
            if question:
                self._answer(question)
            else:
                self._note("nothing was asked yet")
            return
        command = self._commands.get(name)
        self._note(command(words) if command else f"there is no /{name}; /help lists what there is")

    def _answer(self, question: str) -> None:
        """Show an answer as it arrives. Ctrl-C stops it, and what arrived stays in the conversation."""
        try:
            for part in self.client.ask(self.conversation, question):
                if part.reasoning:
                    self.console.print(Text(harmless(part.reasoning), style="dim italic"), end="", soft_wrap=True)
                if part.text:
                    self.console.print(Text(harmless(part.text)), end="", soft_wrap=True)
            self.console.print()
            self._note(self.conversation.speed)
        except KeyboardInterrupt:
            self.console.print()
            self._note("stopped")
        except DsdError as exc:
            self.console.print()
            self.console.print(Text(harmless(str(exc)), style="red"))

    def _note(self, text: str) -> None:
        if text:
            self.console.print(Text(harmless(text), style="dim"))

    def _new(self, _words: str) -> str:
        self.conversation.forget()
        return "forgotten"

    def _system(self, words: str) -> str:
        self.conversation.system = words
        return "instructions taken" if words else "no instructions"

    def _seed(self, words: str) -> str:
        if words and not words.isdecimal():
            return f"{words!r} is no seed: give a number, or nothing"
        self.conversation.seed = int(words) if words else None
        return f"seed {words}" if words else "another seed each time"

    def _temperature(self, words: str) -> str:
        value: float | None = None
        if words:
            with suppress(ValueError):
                value = float(words)
            if value is None or not 0 <= value <= 2:
                return f"{words!r} is no temperature: give a number from 0 to 2, or nothing"
        self.conversation.temperature = value
        return f"temperature {words}" if words else "the model's own temperature"


def harmless(text: str) -> str:
    """Return a text without control characters, which could repaint the terminal or write to its clipboard."""
    return "".join(letter for letter in text if letter in "\n\t" or unicodedata.category(letter) != "Cc")


def typed_lines(history: Path) -> Iterator[str]:
    """Yield what the user types: with history and several lines in a terminal, else line by line."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    history.parent.mkdir(parents=True, exist_ok=True)
    history.touch(mode=0o600)
    session: PromptSession[str] = PromptSession(
        history=FileHistory(str(history)), key_bindings=_keys(), multiline=True, prompt_continuation="… "
    )
    while True:
        try:
            yield session.prompt("> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


def _keys() -> KeyBindings:
    """Return the keys: Enter sends, Alt-Enter begins a new line."""
    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
