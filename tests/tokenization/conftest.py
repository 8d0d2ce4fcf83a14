import pytest

from baichuan_chats import NAMES
from hf_cnllm.models.baichuan import BaichuanTokenizer
from tokenizer_goldens import TokenizerGolden


@pytest.fixture(params=NAMES)
def tokenizer(request):
    return TokenizerGolden(request.param).load(BaichuanTokenizer)


@pytest.fixture
def plain():
    """Baichuan 2, in which a whole chat encodes as its messages do: the standard implementation is a reference."""
    return TokenizerGolden("baichuan2_small").load(BaichuanTokenizer)
