"""The parts of the suite that run on demand: `DSD_TESTS=all scripts/test` runs them too, in half an hour more."""

import os

import pytest

IS_ALL = os.environ.get("DSD_TESTS") == "all"

on_demand = pytest.mark.skipif(not IS_ALL, reason="runs with DSD_TESTS=all")
