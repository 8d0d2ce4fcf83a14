import pytest

from hf_cnllm.demo.tiny_checkpoints import TINY_FAMILIES, write_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """`tiny(family)`: the folder of a tiny checkpoint, written once; only to be read."""
    root = tmp_path_factory.mktemp("tiny")

    def get(family):
        assert family in TINY_FAMILIES
        if not (root / family).exists():
            write_tiny_checkpoint(family, root / family)
        return root / family

    return get
