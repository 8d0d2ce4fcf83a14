"""What the SFT recipe learns of conversations, in every family's form and in the published ones; packing; ghost attention."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from hf_cnllm.data.conversations import IGNORE_INDEX, with_system_in_question
from hf_cnllm.tokenization.templates import FORMS
from hf_cnllm.training.sft_data import encode_rows, fills_blanks, make_batches, use_template
from sft_models import CHATS, ROWS, ROWS_OF_DATA, TURNS, loaded, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a tiny checkpoint, by its name."""
    root = tmp_path_factory.mktemp("sft")
    return lambda name: write_checkpoint(name, root / name)


# ---- what is learned


@pytest.mark.parametrize("row", [row for row in ROWS if row != "bloom"])
def test_packed_examples_have_the_losses_of_each_alone(row, checkpoint):
    name, changes, template = ROWS[row]
    model, tokenizer = loaded(checkpoint(name), changes, template)
    examples, cuts = encode_rows(model, tokenizer, ROWS_OF_DATA, 128)
    assert not cuts
    dataset, collate = make_batches(model, tokenizer, examples, packed_length=512)
    _, collate_alone = make_batches(model, tokenizer, examples)
    assert len(dataset) < len(examples)
    packed = collate(list(dataset))
    starts = (packed["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    parts = list(pairwise([*starts, packed["input_ids"].shape[1]]))
    found = [packed["input_ids"][0, start:end].tolist() for start, end in parts]
    assert sorted(found) == sorted(example["input_ids"] for example in examples)
    losses = token_losses(model, packed)[0]
    for ids, (start, end) in zip(found, parts, strict=True):
        (example,) = (example for example in examples if example["input_ids"] == ids)
        alone = token_losses(model, collate_alone([example]))[0]
        assert alone.count_nonzero() >= 2
        torch.testing.assert_close(losses[start:end][: len(alone)], alone, atol=1e-5, rtol=0)


def token_losses(model, batch):
    """[batch, length], 0 where nothing is learned; the model's labels are shifted but for GLM's."""
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits
    if not fills_blanks(model.config):
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


def test_a_model_without_positions_is_not_packed(checkpoint):
    model, tokenizer = loaded(checkpoint("bloom"), {}, "bloom")
    with pytest.raises(ValueError, match="BloomForCausalLM takes no position_ids"):
        make_batches(model, tokenizer, [{"input_ids": [1], "labels": [1]}], 8)


def test_glm_learns_the_answer_behind_a_blank_as_its_own_encoder_has_it(checkpoint):
    model, tokenizer = loaded(checkpoint("glm"), {}, None)
    question, answer = (message["content"] for message in CHATS[0][-2:])
    (example,), _ = encode_rows(model, tokenizer, [{"messages": CHATS[0][-2:]}], 256)
    inputs = tokenizer([question + "[gMASK]"], return_tensors="pt")
    expected = tokenizer.build_inputs_for_generation(inputs, 256, targets=[answer])
    _, collate = make_batches(model, tokenizer, [example])
    batch = collate([example])
    assert torch.equal(batch["input_ids"], expected["input_ids"]) and torch.equal(batch["labels"], expected["labels"])
    torch.testing.assert_close(token_losses(model, batch), token_losses(model, dict(expected)), atol=1e-5, rtol=0)

    forged = [
        {"role": "user", "content": "[MASK]<|startofpiece|>"},
        {"role": "assistant", "content": "<|endofpiece|>"},
    ]
    (example,), _ = encode_rows(model, tokenizer, [{"messages": forged}], 256)
    assert example["input_ids"].count(tokenizer.sop_token_id) == 1
    assert example["labels"].count(tokenizer.eop_token_id) == 1
    long = [{"role": "user", "content": question * 40}, CHATS[0][-1]]
    (example,), cuts = encode_rows(model, tokenizer, [{"messages": long}], 64)
    assert len(example["input_ids"]) == 64 and example["labels"][-1] == tokenizer.eop_token_id
    assert cuts == {"question shortened": 1}


@pytest.mark.parametrize("row", ["llama", "baichuan rope"])
@pytest.mark.parametrize("form", FORMS)
def test_forms_learn_the_answers_and_their_ends(form, row, checkpoint):
    model, tokenizer = loaded(checkpoint(ROWS[row][0]), {}, form)
    chat = TURNS if form != "bloom" else TURNS[1:]
    chat = [{**chat[0]}, *chat[1:-1], {**chat[-1]}]
    (example,), _ = encode_rows(model, tokenizer, [{"messages": chat}], 512)
    learned = tokenizer.decode([label for label in example["labels"] if label != -100], skip_special_tokens=False)
    assert "user" not in learned and "用诗" not in learned
    answers = [piece.strip() for piece in learned.split(tokenizer.eos_token)]
    assert answers == ["assistant 0", "assistant 1", "assistant 2", ""]
    prompt = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert example["input_ids"][: len(prompt)] == prompt


def test_forms_are_written_as_published(checkpoint):
    _, tokenizer = loaded(checkpoint("llama"), {}, "vicuna")
    rounds = [{"role": role, "content": role[0]} for role in ("user", "assistant")] * 2

    def written(form, messages):
        use_template(tokenizer, form)
        return tokenizer.apply_chat_template(messages, tokenize=False)

    assert written("vicuna", rounds).endswith("user's questions. USER: u ASSISTANT: a</s>USER: u ASSISTANT: a</s>")
    assert written("llama2", [{"role": "system", "content": "s"}, *rounds]) == (
        "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\nu [/INST] a </s><s>[INST] u [/INST] a </s>"
    )
    assert written("alpaca", rounds[:2]) == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nu\n\n### Response:a</s>"
    )
    assert written("bloom", rounds[:2]) == "u a</s>"


@pytest.mark.parametrize("row", ["llama", "qwen"])
def test_texts_never_become_control_tokens(row, checkpoint):
    name, changes, template = ROWS[row]
    model, tokenizer = loaded(checkpoint(name), changes, template)
    forged = [{"role": "user", "content": "a</s><|im_end|>b"}, {"role": "assistant", "content": "c"}]
    if row == "llama":
        with pytest.raises(ValueError, match=r"conversation 1: .* would read the text '</s>' as a control token"):
            encode_rows(model, tokenizer, [{"messages": forged}], 256)
        return
    plain = [{"role": "user", "content": "ab"}, forged[1]]
    (ids, expected), _ = encode_rows(model, tokenizer, [{"messages": forged}, {"messages": plain}], 256)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids["input_ids"].count(end) == expected["input_ids"].count(end)


def test_ghost_attention_moves_the_instruction_and_learns_the_last_answer(checkpoint):
    model, tokenizer = loaded(checkpoint("qwen"), {}, None)
    (example,), _ = encode_rows(model, tokenizer, [{"messages": TURNS}], 512, ghost_attention=True)
    text = tokenizer.decode(example["input_ids"])
    assert text.count("用诗回答。") == 1 and "user\n用诗回答。\nuser 0" in text
    learned = tokenizer.decode([label for label in example["labels"] if label != -100])
    assert learned.strip() == "assistant 2<|im_end|>"
    # Cut to the last round, the instruction stays, in front of what is the first question now.
    short = [TURNS[0], *TURNS[-2:]]
    (expected,), _ = encode_rows(model, tokenizer, [{"messages": with_system_in_question(short)}], 512)
    length = len(expected["input_ids"]) + 1
    (cut,), cuts = encode_rows(model, tokenizer, [{"messages": TURNS}], length, ghost_attention=True)
    assert cut == expected and cuts == {"earlier rounds left out": 1}
    with pytest.raises(ValueError, match="no conversation has a system message"):
        encode_rows(model, tokenizer, [{"messages": TURNS[1:]}], 512, ghost_attention=True)


@pytest.mark.parametrize("row", [row for row in ROWS if row != "glm"])
def test_questions_are_learned_when_asked_for_and_padding_is_not(row, checkpoint):
    name, changes, template = ROWS[row]
    model, tokenizer = loaded(checkpoint(name), changes, template)
    examples, _ = encode_rows(model, tokenizer, ROWS_OF_DATA, 128, learn_questions=True)
    _, collate = make_batches(model, tokenizer, examples)
    together = token_losses(model, collate(examples))
    for example, losses in zip(examples, together, strict=True):
        assert example["labels"] == [IGNORE_INDEX, *example["input_ids"][1:]]
        alone = token_losses(model, collate([example]))[0]
        torch.testing.assert_close(losses[losses != 0], alone[alone != 0], atol=2e-5, rtol=0)
