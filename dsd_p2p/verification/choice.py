"""Chooses the verifier for a request. Stages and auditors both call this function."""

from dsd_p2p.errors import ConfigError
from dsd_p2p.types import TextRequest
from dsd_p2p.verification.adaptive import AdaptiveVerifier
from dsd_p2p.verification.base import Verifier
from dsd_p2p.verification.exact import ExactVerifier
from dsd_p2p.verification.grammar import Grammars
from dsd_p2p.verification.shaped import ShapedVerifier


def choose_verifier(text: TextRequest, grammars: Grammars | None = None) -> Verifier:
    """Return the verifier for `text`. grammars: compiles constraints for the model's tokens.

    Raises:
        ConfigError: this peer does not support what the text request asks for.
    """
    if text.constraint is not None:
        if grammars is None:
            raise ConfigError("this peer cannot constrain answers: its model has no tokenizer that it knows")
        return ShapedVerifier(text, grammars.grammar(text.constraint, text.stop_tokens))
    if text.shaping is not None:
        return ShapedVerifier(text, None)
    if text.relaxation is None:
        return ExactVerifier(text.sampling)
    return AdaptiveVerifier(text.sampling, text.relaxation, text.stop_tokens)
