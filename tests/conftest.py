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
