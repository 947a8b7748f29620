"""Implements `dsd calibrate`: find relaxed mode's thresholds for a quality budget."""

from pathlib import Path

import torch

from node.config.relaxation import write_thresholds
from node.console import ConsoleProgress, console
from node.lab.config import CalibrateConfig


def run(config: CalibrateConfig) -> int:
    """Generate texts in exact mode, then write the thresholds that relax the most tokens within the budget."""
    from node.lab.quality.thresholds import find_thresholds

    torch.set_num_threads(config.threads)
    with ConsoleProgress() as progress:
        thresholds = find_thresholds(config, progress)
    write_thresholds(thresholds, Path(config.output))
    console.print(
        f"{thresholds.relaxed_share:.1%} of the tokens would be relaxed, at a loss of {thresholds.loss_nats:.4f} nats per token "
        f"(budget {config.budget:g}); written to"
    )
    print(config.output)
    return 0
