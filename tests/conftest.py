"""Settings of all tests."""
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes; run by make test-slow")


@pytest.fixture
def shared():
    """The folder of real data beside the project."""
    if not (SHARED / "data").exists():
        pytest.skip("../shared/data with the real recordings does not lie beside this checkout")
    return SHARED
