import pytest

from exportable import KINDS, write_checkpoint
from hf_cnllm.conversion.checkpoint import export_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """`checkpoint(name)`: the folder of a checkpoint of that kind, written once; only to be read."""
    root = tmp_path_factory.mktemp("checkpoints")
    return lambda name: root / name if (root / name).exists() else write_checkpoint(KINDS[name], root / name)


@pytest.fixture(scope="session")
def exported(checkpoint, tmp_path_factory):
    """The same for its export."""
    root = tmp_path_factory.mktemp("exports")

    def get(name):
        if not (root / name).exists():
            export_checkpoint(checkpoint(name), root / name, KINDS[name].target)
        return root / name

    return get
