"""TRL on a model with NormHead: its trainers multiply hidden states by the head's weight on their own, and must get the
model's log-probabilities."""

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import hf_cnllm
from goldens import GOLDENS
from hf_cnllm.demo.tiny_checkpoints import write_tiny_checkpoint

trl = pytest.importorskip("trl")

TOKENIZER = GOLDENS.parent / "tokenizers" / "vocab" / "baichuan2_small"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOKENIZER)


@pytest.fixture(params=["rope", "alibi"])
def model(request, tokenizer):
    torch.manual_seed(0)
    config = hf_cnllm.BaichuanConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, position_embedding=request.param, norm_head=True,
    )  # fmt: skip
    model = hf_cnllm.BaichuanForCausalLM(config)
    with torch.no_grad():
        model.lm_head.raw_weight.mul_(torch.rand(len(tokenizer), 1) * 9 + 1)  # rows far from normalized
    return model


def arguments(kind, tmp_path, **kwargs):
    return kind(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=2, max_steps=1,
        logging_steps=1, save_strategy="no", gradient_checkpointing=False, **kwargs,
    )  # fmt: skip


def own_log_probs(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits = model.eval()(ids).logits[:, :-1]
    return F.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]


CHATS = [
    [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好，我能帮你什么？"}],
    [{"role": "user", "content": "one plus one"}, {"role": "assistant", "content": "two"}],
]


@pytest.mark.parametrize("packing", [False, True])
def test_sft_loss_is_the_models_own_on_the_answers(model, tokenizer, tmp_path, packing):
    dataset = Dataset.from_list([{"messages": chat} for chat in CHATS])
    # Packed rows rely on position_ids alone, which TRL allows with flash attention only: there one document a row.
    args = arguments(
        trl.SFTConfig, tmp_path, assistant_only_loss=True, learning_rate=0.0, max_length=64, packing=packing
    )
    expected = expected_answer_loss(model, tokenizer)
    trainer = trl.SFTTrainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert loss == pytest.approx(expected, abs=1e-4)  # the log is rounded


def expected_answer_loss(model, tokenizer) -> float:
    losses = []
    for chat in CHATS:
        encoded = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        ids = torch.tensor([encoded["input_ids"]])
        mask = torch.tensor(encoded["assistant_masks"])[1:].bool()
        losses.append(-own_log_probs(model, ids)[0][mask])
    return torch.cat(losses).mean().item()


def test_dpo_log_probs_are_the_models_own(model, tokenizer, tmp_path):
    rows = [
        {"prompt": "你好", "chosen": "世界和平", "rejected": "one two"},
        {"prompt": "one", "chosen": "two", "rejected": "七"},
    ]
    args = arguments(trl.DPOConfig, tmp_path, learning_rate=0.0, precompute_ref_log_probs=True, max_length=64)
    trainer = trl.DPOTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "logps/chosen" in entry)
    for side in ("chosen", "rejected"):
        sums = []
        for row in trainer.train_dataset:
            ids = torch.tensor([[*row["prompt_ids"], *row[f"{side}_ids"]]])
            own = own_log_probs(model, ids)[0, max(len(row["prompt_ids"]) - 1, 0) :]
            assert row[f"ref_{side}_logps"] == pytest.approx(own.sum().item(), abs=1e-5 * len(own))
            sums.append(own.sum().item())
        assert log[f"logps/{side}"] == pytest.approx(sum(sums) / len(sums), abs=1e-4)


def test_the_fused_head_gives_the_models_log_probs(model, tokenizer):
    """What SFT, DPO, KTO, GRPO and RLOO share, at the precision the log does not show."""
    utils = pytest.importorskip("trl.trainer.utils")
    if not hasattr(utils, "add_fused_lm_head"):
        pytest.skip("TRL 1.14, the last for Python 3.10, has another")

    ids = torch.randint(10, 400, (2, 12))
    expected = own_log_probs(model, ids)
    fused = utils.add_fused_lm_head(model) or model
    with torch.no_grad():
        output = fused(input_ids=ids, labels=ids, fused_lm_head=True)
    torch.testing.assert_close(output.log_probs.reshape(2, -1)[:, -11:], expected, atol=1e-5, rtol=0)


def test_reward_model_trains(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "base")
    reward = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    rows = [{"prompt": "你好", "chosen": "世界", "rejected": "one"}] * 2
    args = arguments(trl.RewardConfig, tmp_path, max_length=64)
    trainer = trl.RewardTrainer(
        model=reward, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    assert trainer.train().training_loss > 0
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), hf_cnllm.BaichuanForCausalLM)


@pytest.mark.parametrize("family", ["chatglm", "chatglm2", "qwen"])
def test_packing_gives_the_loss_of_rows_alone(family, tmp_path):
    """ChatGLM-6B's prefix and 2-D positions too: a packed row's positions say where its texts begin."""
    write_tiny_checkpoint(family, tmp_path / family)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / family)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    dataset = Dataset.from_list([{"messages": chat} for chat in CHATS])
    losses = []
    for packing in ({}, {"packing": True, "max_length": 128}, {"padding_free": True, "max_length": None}):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / family, dtype=torch.float32)
        args = arguments(trl.SFTConfig, tmp_path, learning_rate=0.0, **packing)
        trainer = trl.SFTTrainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer)
        losses.append(trainer.train().training_loss)
    assert losses[1:] == pytest.approx(losses[:1] * 2, abs=1e-5)


def test_glm_in_sft_says_that_it_has_no_chats(tmp_path):
    write_tiny_checkpoint("glm", tmp_path / "glm")
    model, tokenizer = (kind.from_pretrained(tmp_path / "glm") for kind in (AutoModelForSeq2SeqLM, AutoTokenizer))
    dataset = Dataset.from_list([{"messages": chat} for chat in CHATS])
    with pytest.raises(ValueError, match="GLM has no form for chats, it fills blanks"):
        trl.SFTTrainer(
            model=model, args=arguments(trl.SFTConfig, tmp_path), train_dataset=dataset, processing_class=tokenizer
        )
