"""A small GPT trains with ferroflash as with plain attention: the losses of 50 steps differ by rounding alone."""

import importlib.util
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[1] / "examples" / "train_gpt.py"
    spec = importlib.util.spec_from_file_location("train_gpt", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_losses_are_those_of_eager(example, device):
    exact = torch.tensor(example.train("eager", device=device, dtype=torch.float32))
    eager = torch.tensor(example.train("eager", device=device))
    ours = torch.tensor(example.train("ferroflash", device=device))
    # It learns.
    assert ours[-5:].mean() < 0.8 * ours[0]
    # Noise: how far bf16 with eager attention is from f32, over all steps.
    noise = (eager - exact).abs()
    assert (ours - exact).abs().mean() <= 2 * noise.mean()
    assert (ours - exact).abs().max() <= 3 * noise.max()
    # The first step starts from the same weights, so it has the rounding of one pass.
    assert abs(ours[0] - exact[0]) <= 2 * noise[0] + 1e-3
