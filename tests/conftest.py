"""Settings of all tests."""
import os
import signal
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:       # a shell starts what runs in the background deaf to Ctrl-C, and its children with it; tests of Ctrl-C need ears
    signal.signal(signal.SIGINT, signal.default_int_handler)

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
