"""Settings and the parts of a tiny run, for every test."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.support.runs import save_parts, save_records

# Machines that run this are shared and slow at times: a test fails for wrong values, never for being late.
settings.register_profile("trainer", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("trainer")
torch.set_num_threads(1)  # two tests' worth of threads on two cores would wait for each other


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with llm/, vision/, train.json and images/, to be read only."""
    folder = tmp_path_factory.mktemp("parts")
    save_parts(folder)
    save_records(folder)
    return folder
