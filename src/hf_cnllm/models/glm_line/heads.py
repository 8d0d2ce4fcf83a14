"""What models of GLM's line do with the hidden states of their backbone."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import Cache

from ..._compat.modeling import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MultipleChoiceModelOutput,
    TransformersKwargs,
    Unpack,
    can_return_tuple,
    takes_cache,
)
from ...loss.head import MeanLoss, causal_lm_output
from .generation import PrefixLMGenerationMixin


class HasHead:
    """A model with a backbone, its `base_model`, and an `lm_head`: how the head is shared among processes."""

    base_model: nn.Module
    lm_head: nn.Linear
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}


class PrefixLanguageModel(HasHead, PrefixLMGenerationMixin):
    """Writes what is in a blank."""

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """
        Args:
            input_ids, attention_mask, position_ids: see the backbone.
            labels: (batch, length) token ids, -100 where nothing is to be learned. ChatGLM-6B shifts them here. In GLM and
                GLM-130B they are what each position is to predict: at the start token stands the first token of its blank,
                at the blank's last token the one that ends it.
        """
        outputs: BaseModelOutputWithPast = self.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        return causal_lm_output(self, self.lm_head, outputs, labels, logits_to_keep, **kwargs)  # type: ignore[arg-type]


class MultipleChoiceScoring(MeanLoss, HasHead):
    """Scores each choice by the log-probability of its tokens in the blank."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        choice_ids: Sequence[Sequence[torch.Tensor | Sequence[int]]] | None = None,
        choice_indices: Sequence[Sequence[torch.Tensor | Sequence[int]]] | None = None,
        labels: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MultipleChoiceModelOutput:
        """
        Args:
            input_ids, attention_mask, position_ids: see the backbone; the tokenizer's `build_inputs_for_multiple_choice`
                makes them and the next two.
            choice_ids: for every row, for every choice, its tokens. All rows have the same number of choices.
            choice_indices: for every token of `choice_ids` the place in `input_ids` that predicts it.
            labels: (batch,) the number of the right choice.

        Returns:
            `logits` (batch, choices): sums of log-probabilities; `loss`: their cross entropy with `labels`.
        """
        if choice_ids is None or choice_indices is None:
            raise ValueError(
                "pass `choice_ids` and `choice_indices`, e.g. from the tokenizer's build_inputs_for_multiple_choice"
            )
        outputs: BaseModelOutputWithPast = self.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **{**kwargs, "use_cache": False},
        )
        hidden_states = outputs.last_hidden_state
        scores = []
        for states, choices, places in zip(hidden_states, choice_ids, choice_indices, strict=True):
            for choice, place in zip(choices, places, strict=True):
                choice, place = (torch.as_tensor(ids, device=states.device).reshape(-1) for ids in (choice, place))
                if len(choice) != len(place):
                    raise ValueError(
                        f"`choice_indices` has {len(place)} places for a choice of {len(choice)} tokens in `choice_ids`; "
                        "every token needs one"
                    )
                log_probs = self.lm_head(states[place]).float().log_softmax(dim=-1)
                scores.append(log_probs[torch.arange(len(choice), device=states.device), choice].sum())
        counts = {len(choices) for choices in choice_ids}
        if len(counts) != 1:
            raise ValueError(f"all rows must have the same number of choices, not {sorted(counts)}")
        logits = torch.stack(scores).view(len(choice_ids), -1)

        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits, labels.to(logits.device))

        return MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
