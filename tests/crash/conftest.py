"""A small test network of real processes."""

import shutil
import tempfile
from pathlib import Path

import pytest

from tests.mount.conftest import Net


@pytest.fixture
def small_net():
    base = Path(tempfile.mkdtemp(prefix="dcsfs-crash-", dir="/var/tmp"))
    found = Net(base, "10", "4/6/8/10")
    yield found
    found.testnet("down")
    shutil.rmtree(base)
