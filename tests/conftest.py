"""Fixtures that are costly to make are made once a worker."""

import logging
from pathlib import Path

import pytest
import torch
from families import save_tiny_model
from transformers.utils import logging as transformers_logging

from dsd_p2p.models.progress import NoProgress
from dsd_p2p.models.source import ModelSource, find_model
from dsd_p2p.sim.agreement import read_agreement
from node.lab.recorded import bundled_agreement

# libp2p logs through the root logger's default handler, which would warn about a missing configuration.
logging.getLogger().addHandler(logging.NullHandler())
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
torch.set_num_threads(1)


_FIRST = ("docs", "member", "local", "lab", "gateway", "coordination")
"""Rooms whose tests start processes and wait for them. A worker that is left with one of them at the end is late."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    room = {item: item.path.parent.name for item in items}
    items.sort(key=lambda item: _FIRST.index(room[item]) if room[item] in _FIRST else len(_FIRST))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Return the folder of a family's tiny model."""
    folders: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in folders:
            folders[family] = save_tiny_model(family, tmp_path_factory.mktemp(family))
        return folders[family]

    return get


@pytest.fixture(scope="session")
def smollm() -> ModelSource:
    return find_model("smollm2-135m", NoProgress())


@pytest.fixture(scope="session")
def trace():
    """Return the recorded agreement that the project brings along."""
    return read_agreement(bundled_agreement())
