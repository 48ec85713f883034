"""The model is loaded once for all tests of the examples."""

import pytest
from smollm2 import load_model, load_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="session")
def model():
    return load_model()[0]
