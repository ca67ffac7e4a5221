"""Every test that takes `device` runs on the CPU, and on the GPU if there is one."""

import pytest
import torch

from ferroflash import _launch


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])


@pytest.fixture(autouse=True)
def repeatable():
    """Seeds torch, and lets the first copy of a test warn."""
    torch.manual_seed(0)
    _launch._warned = False


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return "cuda"
