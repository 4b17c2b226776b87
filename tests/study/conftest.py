"""A base model of six matrices, and three experts of it."""

import pytest
from cases import moved, random


@pytest.fixture
def base():
    return random(0)


@pytest.fixture
def experts(base):
    """Three gentle experts, 5 % of the base's norm each."""
    return {name: moved(base, random(i, 0.05)) for i, name in enumerate("abc", 1)}
