import os

import pytest


@pytest.fixture(autouse=True)
def fsync(monkeypatch):
    """Hundreds of them take long on a busy disk, and what they are good for no test can see. The calls are listed."""
    calls = []
    monkeypatch.setattr(os, "fsync", calls.append)
    return calls
