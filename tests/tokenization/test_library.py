"""SentencePiece itself beside the backend: the originals' ids, with offsets, and as long as the rules are the vocabulary's own."""

import copy
import json
import pickle
import random
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, normalizers, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from chatglm_texts import TEXTS
from hf_cnllm import BaichuanTokenizer, ChatGLMTokenizer, QWenTokenizer
from hf_cnllm.demo.tiny_checkpoints import write_tiny_checkpoint
from hf_cnllm.models.glm.tokenization_glm import GLMChineseTokenizer
from hf_cnllm.tokenization.library import SentencePieceLibrary
from hf_cnllm.tokenization.sentencepiece import BYTE_PIECES
from tokenizer_goldens import TokenizerGolden

TIE = "ttttt"  # ttt tt and tt ttt have equal scores, which the library adds in 32 bits and the backend in 64
BPE = {"baichuan1_small": BaichuanTokenizer, "baichuan2_small": BaichuanTokenizer, "chatglm2_small": ChatGLMTokenizer}
BPE |= {"glm_chinese_small": GLMChineseTokenizer}
WITH_FILES = BPE | {"chatglm1_small": ChatGLMTokenizer, "qwen_small": QWenTokenizer}
CONTROL = re.compile(r"\[[gs]?MASK\]|<\w+>|</s>|<0x\w\w>")
MARKED = "a[MASK] b<eop>  <sop>c <unk><s>x</s> [CLS] <n>"
WORDS = [
    "The",
    "quick",
    "brown",
    "fox，敏捷的棕色狐狸",
    "jumps",
    "123",
    "lazy\n\n",
    "dogs。",
    "\t<reserved_5>",
    "①",
    "é",
    "ﾊﾞ",
    "",
    "",
]


def load(name: str):
    return TokenizerGolden(name).load(WITH_FILES[name])


@pytest.fixture(scope="module")
def glm130b(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "glm130b"
    write_tiny_checkpoint("glm130b", folder)
    (folder / "tokenizer.json").unlink(missing_ok=True)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=["chatglm1_small", "glm130b"])
def unigram(request):
    return request.getfixturevalue("glm130b") if request.param == "glm130b" else load(request.param)


@cache
def original(path: str) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=path)


def begins_of_words(encoding) -> set[int]:
    words = encoding.word_ids
    return {at for at in range(1, len(words)) if words[at] != words[at - 1]}


# ---- Unigram: the library's tokens in the backend ----


def test_a_tie_is_decided_as_in_the_original():
    tokenizer = load("chatglm1_small")
    expected = original(tokenizer.vocab_file).encode(TIE)
    assert tokenizer.backend_tokenizer.encode(TIE, add_special_tokens=False).ids != expected
    asked = {
        "ids": tokenizer.encode(TIE, add_special_tokens=False),
        "offsets": tokenizer(TIE, add_special_tokens=False, return_offsets_mapping=True)["input_ids"],
        "words": tokenizer([TIE], add_special_tokens=False, is_split_into_words=True)["input_ids"],
        "second text": tokenizer(TIE, TIE, add_special_tokens=False)["input_ids"][len(expected) :],
        "beside a special token": tokenizer(f"<sop>{TIE}", add_special_tokens=False)["input_ids"][1:],
        "message": tokenizer.encode_message(TIE),
        "tokens": tokenizer.convert_tokens_to_ids(tokenizer.tokenize(TIE)),
    }
    assert asked == dict.fromkeys(asked, expected)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": TIE}], return_dict=False)
    assert tokenizer.decode(expected) == TIE and str(expected)[1:-1] in str(ids)


@given(text=TEXTS)
@example("龘\U0010ffff\x00 龘a")
@example(" \u3000\n")
@settings(max_examples=150, deadline=None)
def test_what_encodings_know_is_the_backends(unigram, text):
    """Offsets, words and names of tokens, wherever both have the same ids. A byte stands for its character here, there for all
    such characters around it, and a control token's name may be several words there."""
    ours = unigram.text_backend().encode(text)
    backend = unigram.backend_tokenizer.encode(text)
    assert unigram.text_backend() is not unigram.backend_tokenizer
    assert max(end for _, end in ours.offsets) == max(end for _, end in backend.offsets)
    if ours.ids == backend.ids:
        for name in ("tokens", "special_tokens_mask", "type_ids"):
            assert getattr(ours, name) == getattr(backend, name)
        assert begins_of_words(ours) <= begins_of_words(backend)
        assert begins_of_words(ours) == begins_of_words(backend) or CONTROL.search(text)
        for token, own, other in zip(ours.tokens, ours.offsets, backend.offsets, strict=True):
            assert own == other or (token in BYTE_PIECES and other[0] <= own[0] < own[1] <= other[1])


@given(texts=st.lists(TEXTS | st.tuples(TEXTS, st.integers(1, 200)).map(lambda pair: pair[0] * pair[1]), max_size=4))
@settings(max_examples=30, deadline=None)
def test_both_roads_agree(unigram, texts):
    texts = [*texts, TIE]
    batch = unigram(texts)
    assert batch["input_ids"] == unigram(texts, return_offsets_mapping=True)["input_ids"]
    assert batch["input_ids"] == [unigram(text)["input_ids"] for text in texts]
    assert [encoding.ids for encoding in batch.encodings] == batch["input_ids"]


# ---- BPE ----


@pytest.mark.parametrize("name", BPE)
def test_parts_are_encoded_as_the_whole(name):
    """Long texts are cut where no piece can stand: in front of white space, and nowhere in a run of it or in a symbol."""
    tokenizer = load(name)
    library, whole = tokenizer.library, original(tokenizer.vocab_file)
    pieces = [piece.replace("▁", " ") for piece in library.model.texts]
    generator = random.Random(0)
    for _ in range(20):
        choices = [generator.choice([WORDS, pieces, library.model.symbols or WORDS]) for _ in range(1_500)]
        text = generator.choice(["", " ", "\n"]).join(map(generator.choice, choices))
        parts = library._parts(library._normalizer.normalize(text))
        assert len(parts) > 3 and "".join(parts) == whole.normalize(text)
        assert library.ids([text, "a", text[:300]]) == [whole.encode(one) for one in (text, "a", text[:300])]
    assert library.ids(["x" * 5_000]) == [whole.encode("x" * 5_000)]  # no place to cut at


# ---- both ----


@pytest.mark.slow
@pytest.mark.parametrize("name", [*BPE, "chatglm1_small"])
def test_every_character_is_normalized_as_by_the_library(name):
    tokenizer = load(name)
    library, normalizer = tokenizer.library, tokenizer.backend_tokenizer.normalizer
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000 and library.takes(chr(code))]
    for at in range(0, len(characters), 1_000):
        text = "".join(f"{char}가{char}\x01" for char in characters[at : at + 1_000])
        assert normalizer.normalize_str(text) == library._normalizer.normalize(library.prepare(text))


@pytest.mark.parametrize("name", [*BPE, "chatglm1_small"])
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_added_tokens_of_any_kind(name, data):
    """Found in a text, with the white space that they take along, as the backend finds them."""
    tokenizer = copy.deepcopy(load(name))
    flags = st.booleans()
    names = st.sampled_from(["<a>", "<ab>", "b>", "ab", "你好", "  ", "<a", "[MASK]x"])
    tokens = st.builds(AddedToken, names, lstrip=flags, rstrip=flags, single_word=flags, normalized=st.just(False))
    tokenizer.add_tokens(data.draw(st.lists(tokens, min_size=1, max_size=4)), special_tokens=data.draw(flags))
    item = st.sampled_from(["<a>", "<ab>", "ab", "你好", "[MASK]x", " ", "\n", "\x1c", "\u3000", "\x85", "x", MARKED])
    texts = data.draw(st.lists(st.lists(item, max_size=10).map("".join), min_size=3, max_size=6))
    for split_special_tokens in (False, True):
        options = {"add_special_tokens": False, "split_special_tokens": split_special_tokens}
        texts[0] += "x" * 400
        expected = tokenizer(texts, return_offsets_mapping=True, **options)["input_ids"]
        assert tokenizer(texts, **options)["input_ids"] == expected


def test_rules_of_somebody_elses():
    tokenizer = copy.deepcopy(load("chatglm1_small"))
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Split("t", "isolated")
    assert tokenizer.text_backend() is backend
    for text in (TIE, TIE * 100):
        assert tokenizer(text)["input_ids"] == backend.encode(text).ids
    tokenizer = copy.deepcopy(load("chatglm1_small"))
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()  # with spaces as they are
    for text in ("Hello WORLD", "Hello WORLD " * 50):
        assert tokenizer(text)["input_ids"] == tokenizer.backend_tokenizer.encode(text).ids


class Lowercase:
    """A step in Python, which cannot be written down."""

    def normalize(self, text):
        text.lowercase()

    def pre_tokenize(self, text):
        text.split(lambda _, part: [part])


@pytest.mark.parametrize("name", WITH_FILES)
def test_changed_rules_hold_for_ids_alone(name):
    """Even where a probe cannot tell: names, accents, code."""
    text = "hello café, 你好 world " * 60
    changes = [
        ("normalizer", lambda rules: [normalizers.Replace("hello", "HOLA"), rules]),
        ("normalizer", lambda rules: [normalizers.NFD(), rules]),
        ("normalizer", lambda rules: [normalizers.Normalizer.custom(Lowercase()), rules]),
        ("pre_tokenizer", lambda rules: [pre_tokenizers.PreTokenizer.custom(Lowercase()), rules]),
    ]
    for part, change in changes:
        tokenizer = copy.deepcopy(load(name))
        backend = tokenizer.backend_tokenizer
        sequence = sys.modules[f"tokenizers.{part}s"].Sequence
        setattr(backend, part, sequence([step for step in change(getattr(backend, part)) if step is not None]))
        expected = backend.encode(text, add_special_tokens=False).ids
        assert not tokenizer.has_own_rules()
        for options in ({}, {"return_offsets_mapping": True}):
            assert tokenizer(text, add_special_tokens=False, **options)["input_ids"] == expected


@pytest.mark.parametrize("name", WITH_FILES)
def test_drawn_segmentations_are_drawn_for_ids_alone(name):
    """BPE dropout and Unigram sampling, which some turn on for training."""
    tokenizer = copy.deepcopy(load(name))
    text = " ".join(sorted(piece for piece in tokenizer.get_vocab() if len(piece) > 1 and piece.isalpha())) * 3
    model = tokenizer.backend_tokenizer.model
    if hasattr(model, "dropout"):
        model.dropout = 0.5
    else:
        model.alpha, model.nbest_size = 0.1, 64
    assert tokenizer(text)["input_ids"] != tokenizer(text)["input_ids"] and not tokenizer.has_own_rules()


def test_characters_that_the_backend_loses_and_halves_of_one():
    tokenizer = load("chatglm1_small")
    for text in ("a\U000e0ffeb", f"\U000e0f00{TIE * 100}", "a\U000e0f02b <n>"):
        assert tokenizer(text)["input_ids"] == tokenizer(text, return_offsets_mapping=True)["input_ids"]
    for options in ({}, {"return_offsets_mapping": True}):
        with pytest.raises(TypeError, match="half a surrogate pair"):
            tokenizer("a\ud800b", **options)


# ---- copies, files, threads, workers ----


def test_copies_need_no_file(tmp_path):
    load("chatglm1_small").save_pretrained(tmp_path, legacy_format=True)
    tokenizer = ChatGLMTokenizer.from_pretrained(tmp_path, generation="chatglm")
    expected = tokenizer([TIE, MARKED])
    pickled = pickle.dumps(tokenizer)
    assert pickle.dumps(tokenizer) == pickled  # what datasets goes by
    (tmp_path / "ice_text.model").unlink()
    for other in (copy.copy(tokenizer), copy.deepcopy(tokenizer), pickle.loads(pickled)):
        assert dict(other([TIE, MARKED])) == dict(expected)
    assert copy.deepcopy(tokenizer).library is tokenizer.library


@pytest.mark.parametrize("name", WITH_FILES)
def test_files_that_belong_together(tmp_path, name):
    tokenizer, text = load(name), f"{TIE} {MARKED} 你好 " * 60

    def uses_library(other) -> bool:
        assert other(text)["input_ids"] == other(text, return_offsets_mapping=True)["input_ids"]
        return other.has_own_rules()

    tokenizer.save_pretrained(tmp_path / "saved")
    again = type(tokenizer).from_pretrained(tmp_path / "saved")
    assert uses_library(again) and again(text)["input_ids"] == tokenizer(text)["input_ids"]
    again.add_tokens(["<new>"])
    again.save_pretrained(tmp_path / "again")
    third = type(tokenizer).from_pretrained(tmp_path / "again")
    assert uses_library(third) and len(third) == len(again)
    assert third("<new>" * 100 + text)["input_ids"] == again("<new>" * 100 + text)["input_ids"]
    settings = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert len(settings["belong_together"]) == 2 and "belong_together" not in third.init_kwargs

    with open(tmp_path / "saved" / "tokenizer.json", "a") as file:  # somebody has changed it
        file.write("\n")
    assert not uses_library(type(tokenizer).from_pretrained(tmp_path / "saved"))
    tokenizer.save_pretrained(tmp_path / "alone", legacy_format=False)
    assert not uses_library(type(tokenizer).from_pretrained(tmp_path / "alone"))


def test_changed_rules_are_saved_as_such(tmp_path):
    tokenizer = copy.deepcopy(load("chatglm2_small"))
    rules = tokenizer.backend_tokenizer.normalizer
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), rules])
    tokenizer.save_pretrained(tmp_path)
    again, text = ChatGLMTokenizer.from_pretrained(tmp_path), "Hello WORLD " * 50
    assert not again.has_own_rules() and again(text)["input_ids"] == tokenizer(text.lower())["input_ids"]


def test_threads():
    tokenizer = copy.deepcopy(load("chatglm1_small"))
    texts = [f"{TIE} {number} {MARKED} 龘" * (1 + number % 7) for number in range(64)]
    expected = [tokenizer(text)["input_ids"] for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda text: tokenizer(text)["input_ids"], texts)) == expected
        found = pool.map(lambda text: copy.copy(tokenizer)(text, return_offsets_mapping=True)["input_ids"], texts)
        assert list(found) == expected
        assert (
            list(pool.map(tokenizer.encode_message, ["你好 " + TIE] * 16))
            == [tokenizer.encode_message("你好 " + TIE)] * 16
        )


@pytest.mark.parametrize(("parallelism", "threads"), [("true", -1), ("0", 1), ("False", 1), (None, -1)])
def test_threads_of_the_library(monkeypatch, parallelism, threads):
    tokenizer, used = load("baichuan2_small"), []
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if parallelism:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallelism)
    texts = ["你好 world " * 3_000, "a", ""]
    expected = tokenizer(texts, return_offsets_mapping=True)["input_ids"]
    assert tokenizer(texts)["input_ids"] == expected

    class Spy:
        def encode(self, parts, num_threads=1):
            used.append(num_threads)
            return [[0] for _ in parts] if isinstance(parts, list) else [0]

    library = SentencePieceLibrary(tokenizer.library.read, tokenizer.backend_tokenizer)
    vars(library)["_engine"] = Spy()
    library.ids(texts)
    assert set(used) == {threads}


@pytest.mark.parametrize("options", [{}, {"return_offsets_mapping": True}], ids=str)
def test_workers(options):
    """Of a DataLoader, which are forked from a process whose backend has threads."""
    tokenizer = load("chatglm1_small")
    texts = [f"{TIE} {MARKED} {number}" for number in range(8)]
    expected = tokenizer(texts, return_offsets_mapping=True)["input_ids"]

    def encode(batch):
        return tokenizer(batch, **options)["input_ids"]

    loader = DataLoader(texts, batch_size=4, num_workers=2, collate_fn=encode, timeout=60)
    assert [row for batch in loader for row in batch] == expected
