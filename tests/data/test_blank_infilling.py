"""Blank infilling: the paper's statistics, texts that survive it, batches that Trainer takes, and filled blanks."""

import math
import random
import re
import warnings
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, Trainer, TrainingArguments, set_seed

from hf_cnllm import ChatGLMConfig, ChatGLMForConditionalGeneration, GLMConfig, GLMForConditionalGeneration
from hf_cnllm.data.blank_infilling import (
    ControlTokens,
    DataCollatorForBlankInfilling,
    make_example,
    restore_text,
    sample_document_span,
    sample_sentence_spans,
    sample_span_length,
    sample_token_spans,
    split_sentences,
)
from hf_cnllm.data.infilling import infill

VOCABULARIES = Path(__file__).parents[1] / "fixtures" / "tokenizers" / "vocab"
ENGLISH = ("glm_bert_small", "glm_roberta_small", "glm_gpt2_small")
TOKENIZERS = ("glm_chinese_small", "chatglm1_small", "chatglm2_small", "chatglm3_small", *ENGLISH)
TEXTS = [
    "今天天气很好。我们去公园散步！你想一起来吗？晚上一起吃饭；然后回家。",
    "人工智能正在改变世界。语言模型可以写诗。它们也会写代码。",
    "Hello world. This is a test! Is it? Yes: it is.",
]
SAMPLES = 10_000


def load_tokenizer(name):
    return AutoTokenizer.from_pretrained(VOCABULARIES / name)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("glm_chinese_small")


def make_glm(tokenizer):
    set_seed(0)
    return GLMForConditionalGeneration(
        GLMConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_layers=2,
            num_attention_heads=4,
            max_sequence_length=128,
            mask_token_id=tokenizer.mask_token_id,
            sop_token_id=tokenizer.sop_token_id,
            eop_token_id=tokenizer.eop_token_id,
        )
    )


# --- statistics, over 10,000 samples ---------------------------------------------------------------------------------


def test_span_lengths_are_poisson_without_0():
    rng = random.Random(0)
    counts = Counter(sample_span_length(rng) for _ in range(SAMPLES))
    for length in range(1, 12):
        expected = math.exp(-3) * 3**length / math.factorial(length) / (1 - math.exp(-3))
        assert counts[length] / SAMPLES == pytest.approx(expected, abs=0.01)
    total = sum(length * count for length, count in counts.items())
    assert total / SAMPLES == pytest.approx(3 / (1 - math.exp(-3)), rel=0.01)


def paper_mask_rate(length, lengths):
    """Section 2.1, word for word: new spans are sampled until at least 15 % of the tokens are masked."""
    masked = 0
    while masked < 0.15 * length:
        masked += next(lengths)
    return masked / length


def test_token_objective_masks_what_the_paper_masks():
    rng, draw = random.Random(0), np.random.default_rng(0)
    poisson = (int(value) for value in iter(lambda: draw.poisson(3), None) if value > 0)
    length = 512
    spans = [sample_token_spans(length, rng) for _ in range(SAMPLES)]
    rates = [sum(end - start for start, end in sample) / length for sample in spans]
    assert min(rates) >= 0.15
    assert mean(rates) == pytest.approx(mean(paper_mask_rate(length, poisson) for _ in range(SAMPLES)), rel=0.005)
    assert mean(rates) == pytest.approx(0.15, abs=0.005)
    lengths = [end - start for sample in spans for start, end in sample]
    assert mean(lengths) == pytest.approx(3 / (1 - math.exp(-3)), rel=0.01)


def test_sentence_objective_masks_15_percent():
    rng = random.Random(0)
    sentences = [(start, start + 4) for start in range(0, 800, 4)]
    rates = [sum(end - start for start, end in sample_sentence_spans(sentences, rng)) / 800 for _ in range(SAMPLES)]
    assert min(rates) >= 0.15
    assert mean(rates) == pytest.approx(0.15, abs=0.01)


def test_document_objective_masks_half_to_all():
    rng = random.Random(0)
    shares = []
    for _ in range(SAMPLES):
        ((start, end),) = sample_document_span(400, rng)
        assert 0 <= start < end <= 400
        shares.append((end - start) / 400)
    assert min(shares) >= 0.5 and max(shares) <= 1
    assert mean(shares) == pytest.approx(0.75, rel=0.01)
    for tenth in range(10):
        inside = [0.5 + tenth / 20 <= share < 0.55 + tenth / 20 for share in shares]
        assert mean(inside) == pytest.approx(0.1, abs=0.01)


def test_objectives_are_mixed_by_weight(tokenizer):
    mix = {"token": 0.5, "sentence": 0.3, "document": 0.2}
    collator = DataCollatorForBlankInfilling(tokenizer, max_length=64, mix=mix)
    tokens = tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    drawn = Counter(collator.make_row({"input_ids": tokens})[0] for _ in range(SAMPLES))
    for objective, weight in mix.items():
        assert drawn[objective] / SAMPLES == pytest.approx(weight, abs=0.01)


# --- spans and texts -------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(length=st.integers(0, 300), seed=st.integers(0, 2**32), rate=st.floats(0.01, 0.9))
def test_token_spans_stand_apart(length, seed, rate):
    spans = sample_token_spans(length, random.Random(seed), rate)
    assert all(0 <= start < end <= length for start, end in spans)
    assert all(first[1] < second[0] for first, second in pairwise(spans))
    assert bool(spans) == (length > 0)


CONTROL = ControlTokens(1000, 1001, {"token": 1002, "sentence": 1003, "document": 1004}, [1005], [1006])


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 999), max_size=80),
    objective=st.sampled_from(["token", "sentence", "document"]),
    seed=st.integers(0, 2**32),
)
def test_unshuffling_the_spans_restores_the_text(tokens, objective, seed):
    rng = random.Random(seed)
    if objective == "token":
        spans = sample_token_spans(len(tokens), rng)
    elif objective == "sentence":
        spans = sample_sentence_spans(split_sentences(["。" if token % 7 == 0 else "字" for token in tokens]), rng)
    else:
        spans = sample_document_span(len(tokens), rng)
    row = make_example(tokens, spans, CONTROL.masks[objective], CONTROL, rng)
    assert len({len(values) for values in row}) == 1
    assert restore_text(row.input_ids, row.positions, row.block_positions) == [1005, *tokens, 1006]
    assert row.input_ids.count(CONTROL.masks[objective]) == row.input_ids.count(CONTROL.start) == len(spans)
    # Every label is the next token of its span, and the last one its end.
    learned = [label for label in row.labels if label != -100]
    assert learned.count(CONTROL.end) == len(spans)
    for index, label in enumerate(row.labels):
        assert (label == -100) == (row.block_positions[index] == 0)
        if label not in (-100, CONTROL.end):
            assert row.input_ids[index + 1] == label and row.positions[index + 1] == row.positions[index]


def test_layout_of_a_row():
    row = make_example([10, 11, 12, 13, 14, 15], [(2, 3), (4, 6)], 1002, CONTROL)
    assert row.input_ids == [1005, 10, 11, 1002, 13, 1002, 1006, 1000, 12, 1000, 14, 15]
    assert row.positions == [0, 1, 2, 3, 4, 5, 6, 3, 3, 5, 5, 5]
    assert row.block_positions == [0, 0, 0, 0, 0, 0, 0, 1, 2, 1, 2, 3]
    assert row.labels == [-100] * 7 + [12, 1001, 14, 15, 1001]


def test_spans_are_shuffled():
    tokens, spans = list(range(40)), [(2, 4), (10, 12), (20, 22)]
    orders = set()
    for seed in range(60):
        row = make_example(tokens, spans, 1002, CONTROL, random.Random(seed))
        orders.add(tuple(row.positions[index] for index, block in enumerate(row.block_positions) if block == 1))
    assert len(orders) == 6


def test_sentences_end_with_their_mark():
    assert split_sentences(["今", "天。", "好", "吗", "？", "是"]) == [(0, 2), (2, 5), (5, 6)]
    assert split_sentences([]) == []


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOKENIZERS)
def test_any_tokenizer_of_the_line(name):
    tokenizer = load_tokenizer(name)
    collator = DataCollatorForBlankInfilling(tokenizer, max_length=256)  # bytes are many
    batch = collator([{"text": text} for text in TEXTS])
    length = batch["input_ids"].shape[1]
    assert length <= 256 and batch["position_ids"].shape == (3, 2, length)
    for row, text in enumerate(TEXTS):
        real = int(batch["attention_mask"][row].sum())
        ids, positions, blocks = (
            values[:real].tolist() for values in (batch["input_ids"][row], *batch["position_ids"][row])
        )
        control = collator.control
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert restore_text(ids, positions, blocks) == [*control.before, *tokens, *control.after]


def test_control_tokens_in_a_text_are_text(tokenizer):
    collator = DataCollatorForBlankInfilling(tokenizer, max_length=96, mix={"document": 1})
    batch = collator([{"text": "空白是[MASK]，结束是<|endofpiece|>。"}])
    assert tokenizer.mask_token_id not in batch["input_ids"]
    assert (batch["input_ids"] == tokenizer.eop_token_id).sum() == 0


@settings(max_examples=50, deadline=None)
@given(length=st.integers(1, 400), max_length=st.integers(12, 128), seed=st.integers(0, 1000), shift=st.booleans())
def test_no_row_is_too_long(tokenizer, length, max_length, seed, shift):
    collator = DataCollatorForBlankInfilling(tokenizer, max_length=max_length, seed=seed, shift_labels=shift)
    batch = collator([{"input_ids": [20] * length}] * 3)
    assert batch["input_ids"].shape[1] <= max_length


def test_seeds(tokenizer):
    def batches(seed):
        collator = DataCollatorForBlankInfilling(tokenizer, max_length=96, seed=seed)
        return [collator([{"text": text} for text in TEXTS]) for _ in range(3)]

    first, again, other = batches(1), batches(1), batches(2)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0]["input_ids"], first[1]["input_ids"])


def test_spans_follow_in_order_unless_they_are_shuffled(tokenizer):
    def starts(shuffle_spans):
        collator = DataCollatorForBlankInfilling(tokenizer, 512, {"token": 1}, shuffle_spans=shuffle_spans)
        batch = collator([{"input_ids": [20] * 200}] * 4)
        blank = batch["position_ids"][:, 1] == 1
        return [positions[first].tolist() for positions, first in zip(batch["position_ids"][:, 0], blank, strict=True)]

    assert all(len(row) > 3 and row == sorted(row) for row in starts(False))
    assert not any(row == sorted(row) for row in starts(True))


def test_shifted_labels_are_the_same_targets(tokenizer):
    rows = [
        DataCollatorForBlankInfilling(tokenizer, max_length=96, seed=3, shift_labels=shift)([{"text": TEXTS[0]}])
        for shift in (False, True)
    ]
    assert torch.equal(rows[0]["labels"][0], rows[1]["labels"][0, 1:])
    assert torch.equal(rows[0]["input_ids"][0], rows[1]["input_ids"][0, :-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix": {"paragraph": 1}}, "`mix`"),
        ({"mix": {"token": 0}}, "`mix`"),
        ({"mask_rate": 1.5}, "`mask_rate`"),
        ({"max_length": 4}, "`max_length`"),
    ],
)
def test_unfit_options_are_refused(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        DataCollatorForBlankInfilling(tokenizer, **options)


@pytest.mark.parametrize("shift", [False, True])
def test_empty_texts_are_padding(tokenizer, shift):
    collator = DataCollatorForBlankInfilling(tokenizer, shift_labels=shift)
    text = {"input_ids": [*range(10, 30)], "seed": 3}
    alone, beside = collator([text]), collator([text, {"input_ids": []}])
    for name in alone:
        assert torch.equal(beside[name][:1], alone[name])
    assert (beside["labels"][1] == -100).all()
    with pytest.raises(ValueError, match="leave empty texts out"):
        collator([{"input_ids": []}])


def test_unfit_inputs_are_refused(tokenizer):
    with pytest.raises(ValueError, match="no tokenizer of the GLM line"):
        DataCollatorForBlankInfilling(load_tokenizer("baichuan2_small"))
    with pytest.raises(ValueError, match="`input_ids` or `text`"):
        DataCollatorForBlankInfilling(tokenizer)([{"content": "x"}])


# --- with models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_trainer(tokenizer, streaming, tmp_path):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"text": TEXTS * 8})
    if streaming:
        dataset = dataset.to_iterable_dataset()
    model = make_glm(tokenizer)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path),
            max_steps=12,
            per_device_train_batch_size=8,
            learning_rate=5e-3,
            logging_steps=1,
            remove_unused_columns=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        data_collator=DataCollatorForBlankInfilling(tokenizer, max_length=96),
        train_dataset=dataset,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert mean(losses[-3:]) < mean(losses[:3])


def test_chatglm_takes_shifted_rows():
    tokenizer = load_tokenizer("chatglm1_small")
    control = ControlTokens.of(tokenizer)
    set_seed(0)
    model = ChatGLMForConditionalGeneration(
        ChatGLMConfig(
            architecture="chatglm",
            vocab_size=len(tokenizer),
            hidden_size=32,
            inner_hidden_size=64,
            num_layers=2,
            num_attention_heads=4,
            bos_token_id=control.start,
            eos_token_id=control.end,
            mask_token_id=control.masks["token"],
            gmask_token_id=control.masks["document"],
        )
    )
    batch = DataCollatorForBlankInfilling(tokenizer, max_length=96, shift_labels=True)([{"text": TEXTS[0]}])
    loss = model(**batch).loss
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], batch["labels"][0, 1:])
    torch.testing.assert_close(loss, expected)


def test_infill_fills_every_blank(tokenizer):
    model = make_glm(tokenizer)
    tokens = tokenizer("我们可以学习语言模型。今天天气很公。", add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in tokens
    spans = [(1, 3), (5, 7)]
    control = ControlTokens.of(tokenizer)
    row = make_example(tokens, spans, tokenizer.mask_token_id, control)
    batch = DataCollatorForBlankInfilling(tokenizer, max_length=96).pad([row])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.2
    blanked, done = "", 0
    for start, end in spans:
        blanked += tokenizer.decode(tokens[done:start]) + "[MASK]"
        done = end
    blanked += tokenizer.decode(tokens[done:])
    whole = tokenizer.decode(tokens)
    assert infill(model.eval(), tokenizer, blanked).replace(" ", "") == whole.replace(" ", "")
    assert infill(model, tokenizer, [blanked, blanked]) == [infill(model, tokenizer, blanked)] * 2
    with pytest.raises(
        ValueError, match=re.escape("has no blank: mark what is to be filled by [MASK], [sMASK] or [gMASK]")
    ):
        infill(model, tokenizer, "没有空白。")


def test_what_the_vocabulary_lacks_is_told(tokenizer):
    model = make_glm(tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        infill(model, tokenizer, "今天[MASK]", max_new_tokens=1)
    with pytest.warns(UserWarning, match="no token for '😀', '𪚥'"):
        assert "😀" not in infill(model, tokenizer, "今天😀[MASK]𪚥", max_new_tokens=1)


def test_infill_without_block_positions_goes_by_the_order_in_the_text(tokenizer):
    """GLM's model looks at the first blank of any kind."""
    control, seen = ControlTokens.of(tokenizer), []
    model = make_glm(tokenizer)
    config = model.config.to_dict() | {"block_position_encoding": False}
    with pytest.raises(ValueError, match="set its `sop_token_id`, `eop_token_id`, `gmask_token_id`"):
        infill(GLMForConditionalGeneration(GLMConfig(**config | {"eop_token_id": None})), tokenizer, "我[MASK]")
    ids = {"sop_token_id": control.start, "eop_token_id": control.end, "mask_token_id": control.masks["token"]}
    ids |= {"smask_token_id": control.masks["sentence"], "gmask_token_id": control.masks["document"]}
    model = GLMForConditionalGeneration(GLMConfig(**config | ids)).eval()

    def generate(input_ids, **kwargs):
        place = int(model.positions_of_prompt(input_ids, None, check=True)[0, 0, -1])
        seen.append(int(input_ids[0, place]))
        return GLMForConditionalGeneration.generate(model, input_ids, **kwargs)

    model.generate = generate
    assert "MASK" not in infill(model, tokenizer, "我[MASK]们[gMASK]可以[sMASK]学[MASK]", max_new_tokens=2)
    assert seen == [control.masks[kind] for kind in ("token", "document", "sentence", "token")]


def test_a_causal_model_is_told_that_it_fills_no_blanks(tokenizer):
    config = ChatGLMConfig(
        vocab_size=99, hidden_size=16, ffn_hidden_size=16, kv_channels=8, num_layers=1, num_attention_heads=2
    )
    with pytest.raises(TypeError, match="fills no blanks: GLM, GLM-130B and ChatGLM-6B do"):
        infill(ChatGLMForConditionalGeneration(config), tokenizer, "你好[MASK]")
