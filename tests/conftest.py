import gc
import importlib.util
import os
from contextlib import contextmanager

# Before anything imports huggingface_hub: no test may reach out.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before anything imports torch: models this small are slower on several threads. `pytest -n 2` uses two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if importlib.util.find_spec("hypothesis"):  # which `nox -s week` is without
    from hypothesis import settings

    # The same examples in every run, so that a change is judged by itself, or others every time.
    settings.register_profile("same", derandomize=True)
    settings.register_profile("drawn")
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish():
    gc.freeze()  # what importing everything left behind need not be searched again and again


@pytest.fixture(autouse=True, scope="module")
def freeze_what_stays():
    """Nor need what tests imported, while trainers collect garbage after every training."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def eager_unless_marked(request):
    """Flex attention compiles itself, which takes minutes on a CPU and computes the same; `compiled` tests let it."""
    if request.node.get_closest_marker("compiled"):
        torch.compiler.reset()  # what other tests compiled counts towards the limit of recompilations
        yield
        return
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.fixture
def files_up_to():
    """`with files_up_to(size):` no file can be written past so many bytes, as on a full disk."""
    resource = pytest.importorskip("resource", reason="Windows has no limits")

    @contextmanager
    def limited(size):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited
