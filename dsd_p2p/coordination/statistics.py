"""What a finished request tells people and scripts."""

from dataclasses import asdict

from dsd_p2p.coordination.engine import Generation


def summarise(generation: Generation, drafter: str, num_prompt_tokens: int, num_tokens: int) -> dict[str, object]:
    """Return what a script wants to know of a finished request; times in seconds.

    tokens_per_s counts from the first tokens on, so that the prompt's cost is in `ttft_s` alone.
    """
    stats, decision = generation.stats, generation.decision
    first_at_s, first_size = generation.arrivals[0]
    last_at_s, _ = generation.arrivals[-1]
    num_later, later_s = num_tokens - first_size, last_at_s - first_at_s
    return {
        "mode": decision.mode,
        "verification": "relaxed" if generation.machine.is_relaxed else "exact",
        "num_relaxed_tokens": stats.num_relaxed_tokens,
        "drafter": drafter,
        "decision": asdict(decision),
        "finish_reason": generation.finish.reason if generation.finish else None,
        "num_prompt_tokens": num_prompt_tokens,
        "num_tokens": num_tokens,
        "tokens_per_s": num_later / later_s if later_s > 0 else num_tokens / (last_at_s - generation.started_at_s),
        "num_later_tokens": num_later,
        "later_s": later_s,
        "ttft_s": first_at_s - generation.started_at_s,
        "total_s": last_at_s - generation.started_at_s,
        "mean_accepted_length": num_tokens / stats.num_epochs,
        "bytes_per_token": stats.link_bytes / num_tokens,
        "mean_stage_s": [total / max(1, stats.num_verdicts) for total in stats.stage_s],
        "mean_draft_step_s": stats.draft_s / max(1, stats.num_draft_steps),
        "counts": asdict(stats),
    }
