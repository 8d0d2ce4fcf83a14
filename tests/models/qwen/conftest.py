import pytest
import torch

from qwen_models import LENGTHS, WIDTH


@pytest.fixture(scope="module")
def batch():
    """Left-padded prompts of `LENGTHS` and their mask."""
    ids = torch.randint(3, 148, (len(LENGTHS), WIDTH), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(WIDTH) >= WIDTH - torch.tensor(LENGTHS)[:, None]).long()
    return ids * mask, mask
