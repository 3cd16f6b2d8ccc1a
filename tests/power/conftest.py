"""A machine for a test."""

import shutil
import tempfile
from pathlib import Path

import pytest

from tests.power.machine import Machine


@pytest.fixture
def machine():
    base = Path(tempfile.mkdtemp(prefix="dcsfs-power-", dir="/var/tmp"))
    found = Machine(base)
    yield found
    found.cut_power()
    shutil.rmtree(base)
