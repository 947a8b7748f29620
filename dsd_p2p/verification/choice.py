"""Chooses the verifier that a request asks for: the one place where a stage and an auditor decide it."""

from dsd_p2p.errors import ConfigError
from dsd_p2p.types import TextRequest
from dsd_p2p.verification.adaptive import AdaptiveVerifier
from dsd_p2p.verification.base import Verifier
from dsd_p2p.verification.exact import ExactVerifier


def choose_verifier(text: TextRequest) -> Verifier:
    """Return what picks the tokens of `text`.

    Raises:
        ConfigError: this peer cannot pick as asked.
    """
    if text.constraint:
        raise ConfigError("this peer cannot follow a constraint: leave it out, or use peers of a later version")
    if text.relaxation is None:
        return ExactVerifier(text.sampling)
    return AdaptiveVerifier(text.sampling, text.relaxation)
