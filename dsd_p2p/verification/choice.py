"""Chooses the verifier for a request. Stages and auditors both call this function."""

from dsd_p2p.errors import ConfigError
from dsd_p2p.types import TextRequest
from dsd_p2p.verification.adaptive import AdaptiveVerifier
from dsd_p2p.verification.base import Verifier
from dsd_p2p.verification.exact import ExactVerifier


def choose_verifier(text: TextRequest) -> Verifier:
    """Return the verifier for `text`.

    Raises:
        ConfigError: this peer does not support what the text request asks for.
    """
    if text.constraint:
        raise ConfigError(
            "this peer does not support constraints: leave the constraint out, or use peers of a later version"
        )
    if text.relaxation is None:
        return ExactVerifier(text.sampling)
    return AdaptiveVerifier(text.sampling, text.relaxation)
