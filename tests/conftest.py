import pytest
import torch

from minimind import MiniMind, ModelConfig, Tokenizer
from minimind.config import data_samples


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.load(data_samples("tokenizer.json"))


@pytest.fixture
def small_model():
    """Random weights large enough that greedy choices differ from position to position."""

    def make(**settings):
        settings = {"vocab_size": 120, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
                    "num_key_value_heads": 2, **settings}  # fmt: skip
        model = MiniMind(ModelConfig(**settings)).eval()
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.1) if parameter.ndim > 1 else parameter.data.uniform_(
                0.5, 1.5
            )
        return model

    return make


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder as the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
