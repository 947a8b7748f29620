"""Writes many texts at once with a target and a drafter in one process, using the verifiers that stages use.

It serves to judge the quality of relaxed mode, where it does not matter how tokens travel. Unlike in a swarm, the
drafter's opinion is known at every position, so relaxed mode relaxes as many tokens as it ever can.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dsd_p2p.models.loader import load_whole
from dsd_p2p.models.progress import Progress
from dsd_p2p.models.rows import LogitsRow
from dsd_p2p.models.source import compute_format, find_model
from dsd_p2p.models.span import TORCH_DTYPES
from dsd_p2p.session.effects import NUM_CANDIDATES
from dsd_p2p.types import TokenId
from dsd_p2p.verification.base import Verifier, VerifierSession
from dsd_p2p.verification.importance import DraftOpinion


@dataclass(slots=True)
class Written:
    """One text. logprob: the target's log probability of all its tokens, in nats.

    lost: how much less that is than the likeliest token's at each position. agreed: for each token, whether it was the
    drafter's likeliest.
    """

    tokens: list[TokenId] = field(default_factory=list)
    num_relaxed: int = 0
    logprob: float = 0.0
    lost: float = 0.0
    agreed: list[bool] = field(default_factory=list)
    is_done: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Disagreement:
    """A position where the drafter's first token is not the target's pick.

    target_row: the target's logits, float32 `[V]` on the CPU.
    """

    strict: TokenId
    target_row: torch.Tensor
    opinion: DraftOpinion


class _Model:
    """One model with its cache for a left-padded batch."""

    def __init__(self, name: str, dtype: str, device: str, progress: Progress) -> None:
        progress.step(f"load {name}", 0, 0)
        self._model = load_whole(find_model(name, progress), TORCH_DTYPES[compute_format(dtype)], device)
        self._cache: Any = None

    def start(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        self._cache = None
        return self.step(tokens, mask)

    def step(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Feed `[B, n]` new tokens. Return the logits after the last of them, `[B, V]`."""
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        output = self._model(
            tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = output.past_key_values
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits


class PairWriter:
    """A target and a drafter that share one vocabulary, loaded on `device`.

    Raises:
        ModelError: one of them cannot be loaded.
    """

    def __init__(self, target: str, drafter: str, *, dtype: str, device: str, progress: Progress) -> None:
        self._target = _Model(target, dtype, device, progress)
        self._drafter = _Model(drafter, dtype, device, progress)
        self._device = device

    @torch.inference_mode()
    def write(
        self,
        prompts: Sequence[Sequence[TokenId]],
        max_tokens: int,
        stop_tokens: Collection[TokenId],
        verifier: Verifier,
        observe: Callable[[Disagreement], None] | None = None,
    ) -> list[Written]:
        """Continue every prompt by up to `max_tokens`. Call `observe` at each position where the models disagree."""
        longest = max(map(len, prompts))
        padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        given = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        tokens, mask = torch.tensor(padded, device=self._device), torch.tensor(given, device=self._device)
        texts = [Written() for _ in prompts]
        sessions = [verifier.open(len(prompt)) for prompt in prompts]
        target, drafter = self._target.start(tokens, mask), self._drafter.start(tokens, mask)
        for step in range(max_tokens):
            picks = self._pick(target, drafter, texts, sessions, observe)
            chosen = torch.tensor([picks], device=self._device).T
            logprobs = torch.log_softmax(target, dim=-1)
            gained = logprobs.gather(1, chosen)[:, 0]
            lost = (logprobs.amax(dim=-1) - gained).tolist()
            agreed = (drafter.argmax(dim=-1) == chosen[:, 0]).tolist()
            for row, (text, token) in enumerate(zip(texts, picks, strict=True)):
                if not text.is_done:
                    sessions[row].accept(token)
                    text.tokens.append(token)
                    text.logprob += float(gained[row])
                    text.lost += lost[row]
                    text.agreed.append(agreed[row])
                    text.is_done = token in stop_tokens
            if all(text.is_done for text in texts) or step == max_tokens - 1:
                break
            mask = torch.cat([mask, torch.ones_like(chosen)], dim=1)
            target, drafter = self._target.step(chosen, mask), self._drafter.step(chosen, mask)
        return texts

    def _pick(
        self,
        target: torch.Tensor,
        drafter: torch.Tensor,
        texts: list[Written],
        sessions: list[VerifierSession],
        observe: Callable[[Disagreement], None] | None,
    ) -> list[TokenId]:
        picks = target.argmax(dim=-1).tolist()
        best = torch.log_softmax(drafter, dim=-1).topk(NUM_CANDIDATES)
        proposed, logprobs = best.indices.cpu().numpy(), best.values.double().cpu().numpy()
        for row, text in enumerate(texts):
            if text.is_done or proposed[row, 0] == picks[row]:
                continue
            opinion = DraftOpinion(tokens=proposed[row].astype(np.int64), logprobs=logprobs[row])
            target_row = target[row].cpu()
            if observe is not None:
                observe(Disagreement(strict=picks[row], target_row=target_row, opinion=opinion))
            view = LogitsRow(target_row, picks[row])
            picks[row], is_relaxed, _ = sessions[row].judge(view, opinion)
            text.num_relaxed += is_relaxed
        return picks
