"""What Trainer has to know of a head: whether accumulated steps add up, and whether labels are shifted."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from goldens import GOLDENS
from hf_cnllm import (
    BaiChuanForCausalLM,
    BaichuanForCausalLM,
    BaichuanForQuestionAnswering,
    BaichuanForSequenceClassification,
    BaichuanForTokenClassification,
    ChatGLMForConditionalGeneration,
    ChatGLMForSequenceClassification,
    GLM130BForConditionalGeneration,
    GLMForConditionalGeneration,
    GLMForMultipleChoice,
    QWenForSequenceClassification,
    QWenForTokenClassification,
    QWenLMHeadModel,
)
from hf_cnllm.families import FAMILIES

IDS = torch.randint(10, 60, (4, 8), generator=torch.Generator().manual_seed(0))
CLASSES = {"labels": torch.tensor([0, 1, 1, 0])}
CHOICES = CLASSES | {"choice_ids": [[[17, 18], [19]]] * 4, "choice_indices": [[[5, 6], [5]]] * 4}
BLANK = torch.tensor([[*range(8)], [0] * 5 + [1, 2, 3]]).expand(4, -1, -1)
NO_DROPOUT = {"embedding_dropout_prob": 0.0, "attention_dropout_prob": 0.0, "output_dropout_prob": 0.0}
OPTIONS = {"glm": NO_DROPOUT, "qwen": {"pad_token_id": 0}}

HEADS = {
    BaichuanForCausalLM: ("baichuan2_7b", {"labels": IDS}),
    BaichuanForSequenceClassification: ("baichuan_7b", CLASSES),
    BaichuanForTokenClassification: ("baichuan_7b", {"labels": IDS % 2}),
    BaichuanForQuestionAnswering: ("baichuan_7b", {"start_positions": IDS[:, 0] % 8, "end_positions": IDS[:, 1] % 8}),
    ChatGLMForSequenceClassification: ("chatglm2_6b", CLASSES),
    GLMForMultipleChoice: ("glm", CHOICES | {"position_ids": BLANK}),
    QWenForSequenceClassification: ("qwen", CLASSES),
    QWenForTokenClassification: ("qwen", {"labels": IDS % 2}),
}


def collate(rows):
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {name: torch.stack(values) if torch.is_tensor(values[0]) else values for name, values in columns.items()}


def trained(head, parts, folder):
    """The loss and the norm of the gradient of one optimizer step over four rows."""
    checkpoint, columns = HEADS[head]
    torch.manual_seed(0)
    model = head.from_pretrained(GOLDENS / checkpoint, **OPTIONS.get(checkpoint, {}))
    for dropout in (module for module in model.modules() if isinstance(module, torch.nn.Dropout)):
        dropout.p = 0.0  # it would draw otherwise for a part than for the whole
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=4 // parts, gradient_accumulation_steps=parts, max_steps=1, learning_rate=0.0,
        logging_steps=1, max_grad_norm=1e9, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        remove_unused_columns=False,
    )  # fmt: skip
    data = [
        {"input_ids": ids} | {name: values[row] for name, values in columns.items()} for row, ids in enumerate(IDS)
    ]
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=collate)
    trainer.train()
    return next((entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
def test_accumulated_steps_are_one_batch(head, tmp_path):
    assert trained(head, 4, tmp_path) == pytest.approx(trained(head, 1, tmp_path), rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.config.model_type)
def test_every_head_without_a_count_of_labels_says_so(family):
    for auto_class, model in family.models.items():
        if auto_class not in ("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"):
            assert model.accepts_loss_kwargs is False, model


@pytest.mark.parametrize(
    ("head", "checkpoint"),
    [
        (BaichuanForCausalLM, "baichuan2_7b"),
        (BaiChuanForCausalLM, "baichuan_7b"),
        (QWenLMHeadModel, "qwen"),
        (ChatGLMForConditionalGeneration, "chatglm_6b_3layer"),
        (ChatGLMForConditionalGeneration, "chatglm2_6b"),
        (GLMForConditionalGeneration, "glm"),
        (GLM130BForConditionalGeneration, "glm130b"),
    ],
)
def test_label_smoothing_smooths_the_labels_of_the_model_s_own_loss(head, checkpoint, tmp_path):
    """Hardly smoothed, the loss is the model's: Trainer's own shifts labels where the model's does."""
    model = head.from_pretrained(GOLDENS / checkpoint, **OPTIONS.get(checkpoint, {})).eval()
    batch = {"input_ids": IDS, "labels": IDS.clone()}
    if checkpoint in ("chatglm_6b_3layer", "glm"):
        batch["position_ids"] = BLANK
    if checkpoint == "glm130b":
        batch |= {"position_ids": BLANK[:, 0], "attention_mask": torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()}
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=1e-9, report_to=[], use_cpu=True)
    trainer = Trainer(model, arguments)
    assert trainer.compute_loss(model, dict(batch)).item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)
