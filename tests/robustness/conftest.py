import pytest
import transformers

import hf_cnllm  # noqa: F401  # registers the families
from robustness.tally import Tally


@pytest.fixture
def tally(record_property):
    """The counts of the test that takes it: printed, and recorded for docs/reliability.md."""
    counts = Tally()
    yield counts
    if counts.tried:
        record_property("tally", counts.record())
        print(f"\n{counts}")


@pytest.fixture(autouse=True)
def no_progress_bars():
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()
