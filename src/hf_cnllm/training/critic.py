"""The critic of PPO, and how it and the other models are asked about rows that are padded on both sides."""

import dataclasses
import inspect
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from ..families import is_prefix_lm

# What transformers and the families call the layer behind the backbone of a sequence classifier.
HEADS = ("score", "classifier_head")


class Critic(nn.Module):
    """The value of each state: a sequence classifier with one label, whose head reads every token instead of the last."""

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        super().__init__()
        self.model = model
        classifier = plain_model(model)
        if head_of(classifier) is None or classifier.config.num_labels != 1:
            raise ValueError(f"a critic is a sequence classifier with one label, {type(classifier).__name__} is none")

    @classmethod
    def from_pretrained(cls, name: str, **options: Any) -> "Critic":
        """From a reward model, head included, or from a language model; then all values are 0 at first."""
        model, found = AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=1, output_loading_info=True, **options
        )
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.startswith(HEADS) and parameter_name in found["missing_keys"]:
                nn.init.zeros_(parameter)
        return cls(model)

    def forward(self, **inputs: Any) -> Tensor:
        """Values [batch, length] of the states behind each token."""
        classifier = plain_model(self.model)
        return head_of(classifier)(classifier.base_model(**inputs).last_hidden_state).squeeze(-1).float()


def head_of(classifier: nn.Module) -> nn.Module | None:
    return next((getattr(classifier, name) for name in HEADS if hasattr(classifier, name)), None)


def adapter_of_classifier(config: Any, classifier: nn.Module) -> Any:
    """The adapter for a sequence classifier, whose head is trained and saved whole; None is no adapter."""
    if config is None:
        return None
    heads = [name for name in HEADS if hasattr(classifier, name)]
    return dataclasses.replace(config, task_type="SEQ_CLS", modules_to_save=heads)


def plain_model(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def inputs_of(model: nn.Module, ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
    """Models that number tokens themselves do so from the first column; those with positions in the text find them."""
    inputs = {"input_ids": ids, "attention_mask": attention_mask, "use_cache": False}
    backbone = getattr(model, "base_model", model)
    counts = not is_prefix_lm(backbone.config)
    if counts and "position_ids" in inspect.signature(backbone.forward).parameters:
        inputs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return inputs
