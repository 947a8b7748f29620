"""Collects the statistics of a finished answer for people and scripts."""

from dataclasses import asdict, dataclass

from dsd_p2p.coordination.generation import Generation
from dsd_p2p.session.request import RequestStats
from dsd_p2p.session.timing import Timing
from dsd_p2p.types import PeerId
from dsd_p2p.window.base import Decision


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestDetails:
    """The details of an answer that only its coordinator knows.

    mean_accepted_length: committed tokens per epoch. num_checks, num_unchecked: spot checks that were carried out, and
    those that no replica answered. is_checked: whether every position was checked. All three are None without `audit`.
    """

    drafter: str
    decision: Decision
    is_relaxed: bool
    finish_reason: str | None
    num_prompt_tokens: int
    mean_accepted_length: float
    bytes_per_token: float
    mean_stage_s: list[float]
    mean_draft_step_s: float
    counts: RequestStats
    num_checks: int | None
    num_unchecked: int | None
    is_checked: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerStatistics:
    """The statistics of one answer. coordinator: the peer that has the details; None if this process coordinated."""

    timing: Timing
    coordinator: PeerId | None = None
    details: RequestDetails | None = None

    def as_json(self) -> dict[str, object]:
        """Return all known values as a flat dict, with the names of `dsd generate --json` (docs/api.md)."""
        timing, details = self.timing, self.details
        shown: dict[str, object] = {
            "num_tokens": timing.num_tokens,
            "tokens_per_s": timing.tokens_per_s,
            "num_later_tokens": timing.num_later_tokens,
            "later_s": timing.later_s,
            "ttft_s": timing.ttft_s,
            "total_s": timing.total_s,
        }
        if self.coordinator is not None:
            shown["coordinator"] = self.coordinator
        if details is not None:
            shown |= {
                "mode": details.decision.mode,
                "verification": "relaxed" if details.is_relaxed else "exact",
                "num_relaxed_tokens": details.counts.num_relaxed_tokens,
                "relaxed_nats": details.counts.relaxed_nats,
                "drafter": details.drafter,
                "decision": asdict(details.decision),
                "finish_reason": details.finish_reason,
                "num_prompt_tokens": details.num_prompt_tokens,
                "mean_accepted_length": details.mean_accepted_length,
                "bytes_per_token": details.bytes_per_token,
                "mean_stage_s": details.mean_stage_s,
                "mean_draft_step_s": details.mean_draft_step_s,
                "counts": asdict(details.counts),
            }
            if details.num_checks is not None:
                shown |= {
                    "num_checks": details.num_checks,
                    "num_unchecked": details.num_unchecked,
                    "is_checked": details.is_checked,
                }
        return shown


def statistics_of(generation: Generation) -> AnswerStatistics:
    """Return the statistics of an answer coordinated here. At least one token must have arrived."""
    stats, timing, checks = generation.stats, generation.timing, generation.driver.checks
    details = RequestDetails(
        drafter=generation.driver.drafter,
        decision=generation.decision,
        is_relaxed=generation.machine.request.is_relaxed,
        finish_reason=generation.finish.reason if generation.finish else None,
        num_prompt_tokens=len(generation.machine.request.prompt),
        mean_accepted_length=timing.num_tokens / stats.num_epochs,
        bytes_per_token=stats.link_bytes / timing.num_tokens,
        mean_stage_s=[total / max(1, stats.num_verdicts) for total in stats.stage_s],
        mean_draft_step_s=stats.draft_s / max(1, stats.num_draft_steps),
        counts=stats,
        num_checks=checks.num_checks if checks else None,
        num_unchecked=checks.num_unchecked if checks else None,
        is_checked=checks.is_whole if checks else None,
    )
    return AnswerStatistics(timing=timing, details=details)
