"""Options become checked values, or a sentence that names the value."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rawdream_env.config import parse_seeds
from rawdream_env.errors import InvalidOptionError
from rawdream_env.piper.envs import PiperSimVectorEnv


@pytest.mark.parametrize("seed", [np.array(5), np.array(5.0), torch.tensor(5), "5", {1: 2}, 3.5])
def test_what_is_neither_an_integer_nor_a_sequence_is_no_seed(seed):
    with pytest.raises(InvalidOptionError, match="must be None, an integer, or a sequence of 2 of them"):
        parse_seeds(seed, 2)


@pytest.mark.parametrize("seed", [[4, 9], np.array([4, 9]), torch.tensor([4, 9]).numpy()])
def test_seeds_by_row(seed):
    assert parse_seeds(seed, 2) == [4, 9]
    assert parse_seeds(np.int64(4), 2) == [4, 5]


@pytest.mark.parametrize(
    ("device", "said"), [("tpu", "choose 'cpu', 'cuda'"), ("cuda:99", "needs a GPU|does not exist")]
)
def test_a_device_is_checked_by_an_environment_without_a_model(device, said):
    with pytest.raises(InvalidOptionError, match=said):
        PiperSimVectorEnv(1, device=device, output="torch")
