"""What every test starts from: no key, no mode, no way out of this machine."""

import os
import socket
from pathlib import Path

import pytest

from helpers.live import models
from helpers.settings import INTERNAL, KEYS, SETTINGS

ROOT = Path(__file__).resolve().parents[1]

# `make test` gives each file to one process. These take longest, so they start first.
SLOWEST = ["test_live.py", "03_shared_helpers.ipynb", "test_interrupted.py", "01_correctness.ipynb"]

# At import, so that the notebooks' kernels start without them too.
for name in (*SETTINGS, *INTERNAL, *KEYS, "OPENAI_BASE_URL"):
    os.environ.pop(name, None)


def pytest_collection_modifyitems(config, items):
    config.option.cov_source = None  # or nbval measures in the kernels too, and waits in vain
    rank = {name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(autouse=True)
def no_env_file(monkeypatch, tmp_path):
    """Not the developer's own `.env`; a test may put one into tmp_path."""
    monkeypatch.setattr("helpers.settings.ROOT", tmp_path)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in (
            "127.0.0.1",
            "::1",
            "localhost",
        ):
            raise AssertionError(f"a test reached for {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    """Between attempts of a live call; what a server asks for is waited for all the same."""
    monkeypatch.setattr(models, "FIRST_WAIT", 0.01)


@pytest.fixture
def rows():
    """Twelve correctness rows on three documents."""
    return [
        {
            "question": f"Question {i}?",
            "reference": f"The reference number {i}.",
            "document": f"document {i % 3}",
            "response_data": {"model": "m", "text": f"The answer number {i}.", "context": "..."},
        }
        for i in range(12)
    ]
