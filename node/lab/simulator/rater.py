"""Defines and fits the network that rates windows.

Training uses torch; serving uses numpy (`dsd_p2p.window.learned.network`).
"""

import sys
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dsd_p2p.window.catalogue import CATALOGUE
from dsd_p2p.window.learned.features import NAMES
from dsd_p2p.window.learned.network import NUM_BLOCKS, VERSION
from node.lab.simulator.samples import Sample

_WIDTH = 48
_BATCH = 512
_RATE, _DECAY = 2e-3, 1e-3


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(_WIDTH, _WIDTH), nn.Linear(_WIDTH, _WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = hidden + self.outer(nn.functional.silu(self.inner(hidden)))
        return result


class _Rater(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(len(NAMES), _WIDTH)
        self.blocks = nn.ModuleList([_Block() for _ in range(NUM_BLOCKS)])
        self.last = nn.Linear(_WIDTH, len(CATALOGUE))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.silu(self.first(inputs))
        for block in self.blocks:
            hidden = block(hidden)
        result: torch.Tensor = self.last(nn.functional.silu(hidden))
        return result


def train(
    samples: Sequence[Sample], num_epochs: int, seed: int
) -> tuple[dict[str, NDArray[np.generic]], tuple[float, float]]:
    """Return the weights by name, and the L1 losses on the training scenarios and on the tenth that is held out."""
    torch.manual_seed(seed)
    num_held_out = max(1, len(samples) // 10)
    inputs = np.concatenate([sample.inputs for sample in samples])
    mean, scale = inputs.mean(axis=0), inputs.std(axis=0) + 1e-3
    parts = [_tensors(part, mean, scale) for part in (samples[num_held_out:], samples[:num_held_out])]
    network = _Rater()
    _fit(network, *parts[0], num_epochs)
    with torch.inference_mode():
        trained, held_out = (_loss(network(rows), labels).item() for rows, labels in parts)
    weights: dict[str, NDArray[np.generic]] = {
        name: value.numpy().astype(np.float32) for name, value in network.state_dict().items()
    }
    weights |= {
        "version": np.array(VERSION),
        "arms": np.array(list(CATALOGUE)),
        "features": np.array(NAMES),
        "mean": mean.astype(np.float32),
        "scale": scale.astype(np.float32),
    }
    return weights, (trained, held_out)


def _fit(network: _Rater, inputs: torch.Tensor, labels: torch.Tensor, num_epochs: int) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=_RATE, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_epochs)
    for epoch in range(num_epochs):
        for chosen in torch.split(torch.randperm(len(inputs)), _BATCH):
            optimizer.zero_grad()
            loss = _loss(network(inputs[chosen]), labels[chosen])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()
        if epoch % 20 == 0:
            print(f"epoch {epoch}: {loss.item():.3f}", file=sys.stderr, flush=True)


def _loss(ratings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean absolute error over the known speeds."""
    known = torch.isfinite(labels)
    return nn.functional.l1_loss(ratings[known], labels[known])


def _tensors(
    part: Sequence[Sample], mean: NDArray[np.floating], scale: NDArray[np.floating]
) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = np.concatenate([(sample.inputs - mean) / scale for sample in part])
    labels = np.concatenate([np.repeat(sample.label[None], len(sample.inputs), axis=0) for sample in part])
    return torch.from_numpy(inputs.astype(np.float32)), torch.from_numpy(labels)
