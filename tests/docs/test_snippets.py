"""Every example of the README, the docs and the model cards runs as it stands there; see tests/doc_snippets.py."""

import re
from collections import Counter

import pytest
from huggingface_hub import constants

from doc_snippets import PAGES, ROOT, blocks_of, run_blocks, tiny_name, write_hub, write_working_folder

BLOCKS = {str(page.relative_to(ROOT)): blocks_of(page) for page in PAGES}
TRANSLATED = [name for name in BLOCKS if name.endswith(".zh.md")]
# Why an example is not run -> how many there are.
NOT_RUN = {
    "installs packages": 5,
    "measures for minutes": 1,
    "trains for minutes": 1,
    "needs vLLM": 1,
    "of a model at hand": 8,
    "needs another engine": 2,
    "needs several GPUs": 1,
    "needs a package of an extra": 3,
    "needs a GPU, bf16 being TRL's default": 1,
    "pushes to the Hub": 1,
    "needs the files of a release": 1,
}


def runnable(name: str, slow: bool) -> list:
    return [block for block in BLOCKS[name] if not block.not_run and (slow or not block.is_slow)]


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    cache = tmp_path_factory.mktemp("hub")
    write_hub(cache)
    return cache


@pytest.fixture
def offline_hub(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))  # for commands
    monkeypatch.chdir(tmp_path)
    write_working_folder(tmp_path)


def of_its_own(name: str) -> bool:
    """Whether a page's examples are more than those of an earlier model card for another checkpoint of its family."""
    code = [tiny_name(block.code) for block in BLOCKS[name]]
    earlier = [other for other in BLOCKS if other < name and other.startswith("model_cards/")]
    return not name.startswith("model_cards/") or all(
        code != [tiny_name(block.code) for block in BLOCKS[other]] for other in earlier
    )


def english(name: str) -> str:
    return name.replace(".zh.md", ".md")


ENGLISH = [name for name in BLOCKS if name not in TRANSLATED]


@pytest.mark.parametrize("name", [name for name in ENGLISH if runnable(name, slow=False) and of_its_own(name)])
def test_examples_run(name, offline_hub):
    run_blocks(runnable(name, slow=False))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [name for name in ENGLISH if any(block.is_slow for block in BLOCKS[name]) or not of_its_own(name)],
)
def test_slow_examples_run(name, offline_hub):
    run_blocks(runnable(name, slow=True))


@pytest.mark.parametrize("name", TRANSLATED)
def test_a_translated_page_has_the_examples_of_the_english_one(name):
    """Comments may be translated; what runs, and what is said about it, is the same."""
    assert [block.meaning for block in BLOCKS[name]] == [block.meaning for block in BLOCKS[english(name)]]


def test_what_is_not_run_is_counted():
    """A new example that is not run needs a reason that is known here, and a higher count."""
    english_blocks = [block for name, blocks in BLOCKS.items() if name not in TRANSLATED for block in blocks]
    assert Counter(block.not_run for block in english_blocks if block.not_run) == NOT_RUN


@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_of_code_is_seen(name):
    """No fence without a language, or indented, that the tests would pass over; `text` and `json` are no examples."""
    fences = re.findall(r"^ *```(\w*)", (ROOT / name).read_text(encoding="utf-8"), flags=re.M)
    openings = fences[::2]
    assert set(openings) <= {"python", "bash", "text", "json"}
    assert sum(language in ("python", "bash") for language in openings) == len(BLOCKS[name])
