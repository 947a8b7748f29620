"""A tokenizer whose tokens are single letters, for tiny models that are to write constrained text."""

from pathlib import Path

from families import VOCAB
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

EOS = 2
_LETTERS = ["Ċ", "Ġ", *(chr(code) for code in range(33, 127))]
"""Line break, space and the other printable letters, as byte-level tokenizers write them."""


def save_letters(folder: Path) -> Path:
    """Give the model in `folder` a tokenizer and a stop token."""
    vocab = {"<s>": 1, "</s>": EOS, **{letter: 3 + index for index, letter in enumerate(_LETTERS)}, "<unk>": 0}
    assert len(vocab) < VOCAB
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def spelled(text: str) -> list[int]:
    """Return the tokens of a text of printable letters and spaces."""
    return [3 + _LETTERS.index({"\n": "Ċ", " ": "Ġ"}.get(letter, letter)) for letter in text]


def read(tokens) -> str:
    """Return the text of some tokens, without special ones."""
    letters = [_LETTERS[token - 3] for token in tokens if token >= 3]
    return "".join({"Ċ": "\n", "Ġ": " "}.get(letter, letter) for letter in letters)
