"""Proximal policy optimization of a language model against a reward (arXiv 1707.06347, 2203.02155), with what Qwen
(2309.16609, section 3.2.2) and Baichuan 2 (2309.10305, section 4.3) report of theirs: four models, a critic that learns
alone at first, two responses per query, rewards normalized by running moments, clipped values, pre-training loss mixed in.

    queries ──actor──> responses ──reward model, reference──> rewards ──critic──> advantages, returns ──> actor, critic
    └───────────── `collect`, without gradients ─────────────────────────────────────────────┘        `update`

Shapes: N responses a step and process, P tokens of the longest query (padded on the left), R of the longest response (padded
on the right). Token t of a response is chosen, and its state valued, at the position before it.
"""

import contextlib
import copy
import inspect
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    DataCollatorForSeq2Seq,
    DefaultFlowCallback,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    get_scheduler,
    set_seed,
)

from .._compat import reporting_callbacks
from .critic import Critic, inputs_of, plain_model
from .ppo_equations import (
    RunningMoments,
    adapted_kl_coefficient,
    advantages_and_returns,
    policy_losses,
    token_entropy,
    token_log_probs,
    token_rewards,
    value_losses,
)
from .recipe import check_counts, check_sampling
from .reward import RewardFunction, RewardModels, score_responses
from .run import complete_checkpoints, stop_at_non_finite
from .sampling import sample_responses

CRITIC_FOLDER, STATE_FILE = "critic", "trainer_state.json"
COUNTS = ("queries_per_device", "responses_per_query", "max_new_tokens", "ppo_epochs", "ptx_batch_size")


@dataclass
class PPOConfig(TrainingArguments):
    """A step answers `queries_per_device` queries on each process and learns from the answers. `max_steps`, `num_train_epochs`,
    `logging_steps`, `save_steps` and the schedule of the learning rate count such steps. An optimizer step takes
    `per_device_train_batch_size` x `gradient_accumulation_steps` responses of each process."""

    learning_rate: float = field(default=1e-6, metadata={"help": "of the actor"})
    critic_learning_rate: float = field(default=5e-6, metadata={"help": "of the critic"})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "schedule of both learning rates"})
    logging_steps: float = field(default=1, metadata={"help": "log every so many steps"})
    queries_per_device: int = field(default=16, metadata={"help": "queries answered a step and process"})
    responses_per_query: int = field(default=2, metadata={"help": "responses sampled for each query"})
    max_new_tokens: int = field(default=256, metadata={"help": "tokens of a response at most"})
    top_p: float = field(default=0.9, metadata={"help": "nucleus that responses are sampled from"})
    temperature: float = field(default=1.0, metadata={"help": "of the policy, in sampling and learning"})
    ppo_epochs: int = field(default=1, metadata={"help": "times that each response is learned from"})
    critic_warmup_steps: int = field(default=50, metadata={"help": "first steps, in which the critic learns alone"})
    kl_coefficient: float = field(default=0.04, metadata={"help": "weight of the KL penalty in the reward"})
    final_kl_coefficient: float | None = field(default=None, metadata={"help": "weight it falls to, linearly"})
    kl_target: float | None = field(default=None, metadata={"help": "KL per response that the weight is adapted to"})
    clip_range: float = field(default=0.2, metadata={"help": "how far the ratio of probabilities counts"})
    value_clip_range: float = field(default=0.15, metadata={"help": "how far values may move in a step"})
    gamma: float = field(default=1.0, metadata={"help": "discount per token"})
    gae_lambda: float = field(default=0.95, metadata={"help": "of the advantages"})
    normalize_rewards: bool = field(default=True, metadata={"help": "by the running mean and deviation"})
    missing_end_penalty: float = field(default=0.0, metadata={"help": "taken off a response that does not end"})
    ptx_coefficient: float = field(default=0.0, metadata={"help": "weight of the pre-training loss"})
    ptx_batch_size: int = field(default=8, metadata={"help": "pre-training examples an optimizer step and process"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "per_device_train_batch_size", "gradient_accumulation_steps", *COUNTS)
        check_sampling(self)
        responses = self.queries_per_device * self.responses_per_query
        minibatch = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if responses % minibatch:
            raise ValueError(
                f"queries_per_device x responses_per_query is {responses}, which per_device_train_batch_size x "
                f"gradient_accumulation_steps, {minibatch}, must divide"
            )
        if "epoch" in (self.save_strategy, self.logging_strategy) or self.eval_strategy != "no":
            raise ValueError(
                "PPO logs and saves by steps, and evaluates nothing but its rewards: save_strategy is steps or no"
            )
        if self.kl_target is not None and self.kl_target <= 0:
            raise ValueError(f"--kl_target must be above 0, got {self.kl_target}")
        if self.kl_target is not None and self.final_kl_coefficient is not None:
            raise ValueError("kl_target adapts the weight of the KL penalty, final_kl_coefficient fixes it: give one")


class PPOTrainer:
    """Trains an actor, and its critic, on queries. On one process or, with `accelerate launch`, on several with DDP.

    Args:
        model: the actor, a causal language model or one with a PEFT adapter, which switched off is the reference.
        queries: token ids of each query, as the chat template opens the reply.
        reward: a sequence classifier with one label, two as one [`RewardModels`], or a function of texts.
        tokenizer: of all the models.
        critic: trained beside the actor.
        end_ids: tokens that end a response.
        reference: the frozen model that the actor stays near; default: the actor as it is now.
        ptx_rows: pre-training examples, each with `input_ids` and `labels`; for `ptx_coefficient`.

    Raises:
        ValueError: models of different vocabularies, or arguments that do not go together.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: PPOConfig,
        queries: Sequence[Sequence[int]],
        reward: PreTrainedModel | RewardModels | RewardFunction,
        tokenizer: Any,
        critic: Critic,
        end_ids: Sequence[int],
        reference: PreTrainedModel | None = None,
        ptx_rows: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        if not queries:
            raise ValueError("there are no queries to answer")
        if (args.ptx_coefficient > 0) != bool(ptx_rows):
            raise ValueError(
                "ptx_coefficient weighs the loss on pre-training examples: give both (--ptx_data), or neither"
            )
        if reference is None and not isinstance(model, PeftModel):
            reference = copy.deepcopy(model)
        vocabulary = plain_model(model).config.vocab_size
        for name, other in {"critic": critic.model, "reference": reference}.items():
            size = plain_model(other).config.vocab_size if isinstance(other, nn.Module) else vocabulary
            if size != vocabulary:
                raise ValueError(f"the {name} is of another vocabulary: {size} tokens, the actor has {vocabulary}")
        self.end_ids = list(end_ids)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end_ids[0]
        if isinstance(reward, PreTrainedModel):
            reward = RewardModels(reward)
        if isinstance(reward, RewardModels):
            reward.check(vocabulary, self.pad_id)
        self.accelerator = Accelerator(
            cpu=args.use_cpu, mixed_precision="bf16" if args.bf16 else "fp16" if args.fp16 else "no"
        )
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError("PPO trains two models and samples in between: use DDP (with LoRA, if memory is short)")
        set_seed(args.seed + args.process_index)  # each process samples responses of its own
        self.args, self.queries, self.tokenizer, self.ptx_rows = args, queries, tokenizer, ptx_rows
        self.collate_ptx = DataCollatorForSeq2Seq(tokenizer)
        self.reward, self.reference = reward, reference
        for frozen in (reward, reference):
            if isinstance(frozen, nn.Module):
                frozen.requires_grad_(False).eval().to(self.accelerator.device)
        for trained in (model, critic.model):
            for module in trained.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0  # the ratio of the same policy is 1
            if args.gradient_checkpointing:
                how = args.gradient_checkpointing_kwargs or {"use_reentrant": False}
                trained.gradient_checkpointing_enable(how)
        self.state = TrainerState(
            max_steps=_steps(args, len(queries)),
            num_train_epochs=math.ceil(args.num_train_epochs),
            is_local_process_zero=args.local_process_index == 0,
            is_world_process_zero=args.process_index == 0,
        )
        self.state.compute_steps(args, self.state.max_steps)
        self.control = TrainerControl()
        self.callbacks: list[TrainerCallback] = [DefaultFlowCallback()]
        self.callbacks += [one() for one in reporting_callbacks(args.report_to)]
        self.callbacks.append(PrinterCallback() if args.disable_tqdm else ProgressCallback())
        self._prepare(model, critic)

    def _prepare(self, actor: Any, critic: Any) -> None:
        args, prepare = self.args, self.accelerator.prepare
        rates = {"actor": (actor, args.learning_rate), "critic": (critic, args.critic_learning_rate)}
        self.has_frozen_weights = False
        self.trained: dict[str, tuple[nn.Module, Any, Any]] = {}
        for name, (model, rate) in rates.items():
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            self.has_frozen_weights |= len(parameters) < len(list(model.parameters()))
            kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
            optimizer = kind(parameters, **settings | {"lr": rate, "weight_decay": args.weight_decay})
            steps = max(self.state.max_steps - (args.critic_warmup_steps if name == "actor" else 0), 1)
            scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps)
            self.accelerator.register_for_checkpointing(scheduler)
            self.trained[name] = (*prepare(model, optimizer), scheduler)
        self.model: Any = self.accelerator.unwrap_model(self.trained["actor"][0])
        self.critic: Any = self.accelerator.unwrap_model(self.trained["critic"][0])
        self.moments, self.kl_coefficient = RunningMoments(), args.kl_coefficient
        self.pending: list[dict[str, float]] = []  # measured since the last log
        self.accelerator.register_for_checkpointing(self)
        self.accelerator.register_save_state_pre_hook(_leave_frozen_weights_out)

    # What a checkpoint holds besides weights, optimizers, schedules and random states. The place in the data is the step.
    def state_dict(self) -> dict[str, Any]:
        return {"moments": vars(self.moments), "kl_coefficient": self.kl_coefficient, "pending": self.pending}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self.moments).update(state["moments"])
        self.kl_coefficient, self.pending = state["kl_coefficient"], state["pending"]

    def add_callback(self, callback: TrainerCallback) -> None:
        self.callbacks.append(callback)

    def _tell(self, event: str, **more: Any) -> None:
        for callback in self.callbacks:
            answer = getattr(callback, event)(
                self.args, self.state, self.control, model=self.model, processing_class=self.tokenizer, **more
            )
            self.control = answer or self.control

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        """Trains up to `max_steps`, from a checkpoint on if one is given: with the numbers of a run that did not stop."""
        if resume_from_checkpoint is not None:
            self.accelerator.load_state(resume_from_checkpoint, strict=not self.has_frozen_weights)
            history = TrainerState.load_from_json(str(Path(resume_from_checkpoint, STATE_FILE)))
            self.state.global_step, self.state.log_history = history.global_step, history.log_history
        self._tell("on_train_begin")
        while self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            self.control = TrainerControl()
            batch, metrics = self.collect()
            self.pending.append(metrics | self.update(batch))
            self._adapt_kl_coefficient(metrics["kl"])
            self.state.global_step += 1
            step_queries = self.args.queries_per_device * self.args.world_size
            self.state.epoch = self.state.global_step * step_queries / len(self.queries)
            self._tell("on_step_end")
            if self.control.should_log:
                self._log()
            if self.control.should_save:
                self._save_checkpoint()
        self._tell("on_train_end")

    def collect(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Answers the next queries: a row a response, with all that learning from it needs, and what was measured."""
        args, reduce = self.args, self.accelerator.reduce
        queries = [
            query
            for query in self._next(self.queries, args.queries_per_device, self.state.global_step)
            for _ in range(args.responses_per_query)
        ]
        self.model.eval()
        self.critic.eval()
        with torch.no_grad(), self.accelerator.autocast():
            lengths = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p")}
            batch, has_end = sample_responses(self.model, queries, self.end_ids, self.pad_id, **lengths)
            mask = batch["mask"]
            rows = _split(batch, torch.arange(len(mask)).split(args.per_device_train_batch_size))
            actor = [(token_log_probs(*found), token_entropy(found[0])) for found in self._logits(self.model, rows)]
            log_probs, entropy = (torch.cat(parts) for parts in zip(*actor, strict=True))
            with self.model.disable_adapter() if self.reference is None else contextlib.nullcontext():
                of_reference = self._logits(self.reference or self.model, rows)
                ref_log_probs = torch.cat([token_log_probs(*found) for found in of_reference])
            values = torch.cat([self._values(self.critic, row) for row in rows])
            scores = score_responses(self.reward, self.tokenizer, queries, batch, args.per_device_train_batch_size)
        if not torch.isfinite(self.accelerator.gather(scores)).all():
            raise FloatingPointError(f"a reward is not finite at step {self.state.global_step}")
        raw, scores = scores, scores - args.missing_end_penalty * ~has_end
        if args.normalize_rewards:
            self.moments.update(self.accelerator.gather(scores))
            scores = self.moments.normalize(scores)
        log_ratio = (log_probs - ref_log_probs) * mask
        rewards = token_rewards(scores.float(), log_ratio, mask, self.kl_coefficient)
        advantages, returns = advantages_and_returns(rewards, values, mask, args.gamma, args.gae_lambda)
        metrics = {
            "reward": raw.mean(),
            "kl": log_ratio.sum(1).mean(),  # Σ_t log π/π_ref of a response, whose mean estimates KL(π ‖ π_ref)
            "entropy": self._mean(entropy, mask),
            "value_error": self._mean((returns - values).square(), mask),
            "response_length": mask.sum(1).mean(),
            "ended": has_end.float().mean(),
        }
        mean = self._mean(advantages, mask)
        deviation = self._mean((advantages - mean).square(), mask).sqrt()
        batch |= {
            "log_probs": log_probs,
            "values": values,
            "returns": returns,
            "advantages": (advantages - mean) / (deviation + 1e-8) * mask,
        }
        return batch, {name: reduce(value.float(), "mean").item() for name, value in metrics.items()}

    def update(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """Learns from the responses: the critic always, the actor once the critic has been warmed up."""
        args, step = self.args, self.state.global_step
        trains_actor = step >= args.critic_warmup_steps
        for model in (self.model, self.critic):
            model.train(args.gradient_checkpointing)
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps
        minibatches = [part for _ in range(args.ppo_epochs) for part in torch.randperm(len(batch["ids"])).split(size)]
        measured: list[dict[str, float]] = []
        for number, minibatch in enumerate(minibatches):
            rows = _split(batch, minibatch.split(args.per_device_train_batch_size))
            # DDP takes the mean of the processes' gradients: with the mean of their tokens it is that of one big batch.
            tokens = self.accelerator.reduce(batch["mask"][minibatch].sum(), "mean")
            found = self._optimize("critic", [partial(self._value_loss, row, tokens) for row in rows])
            if trains_actor:
                losses = [partial(self._policy_loss, row, tokens) for row in rows]
                if self.ptx_rows:
                    losses.append(partial(self._ptx_loss, step * len(minibatches) + number))
                found |= self._optimize("actor", losses)
            measured.append(found)
        self.trained["critic"][2].step()
        if trains_actor:
            self.trained["actor"][2].step()
        means = _means(measured)
        means["loss"] = sum(value for name, value in means.items() if name.endswith("_loss"))
        reduced = self.accelerator.reduce(torch.tensor(list(means.values()), device=self.accelerator.device), "mean")
        return dict(zip(means, reduced.tolist(), strict=True))

    # --- what a step is made of ---

    def _next(self, data: Sequence[Any], count: int, number: int) -> list[Any]:
        """The `number`-th `count` of the data for this process: a new order each time that all have been seen."""
        start = (number * self.args.world_size + self.args.process_index) * count
        chosen, orders = [], {}
        for place in range(start, start + count):
            epoch, index = divmod(place, len(data))
            if epoch not in orders:
                seed = torch.Generator().manual_seed(self.args.seed + epoch)
                orders[epoch] = torch.randperm(len(data), generator=seed).tolist()
            chosen.append(data[orders[epoch][index]])
        return chosen

    def _logits(self, model: Any, rows: Sequence[dict[str, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Of one row of responses after the other, the logits [n, R, vocabulary] of each token's choice, and the tokens."""
        plain = plain_model(self.accelerator.unwrap_model(model))
        takes_number = "logits_to_keep" in inspect.signature(plain.forward).parameters
        for row in rows:
            length = row["mask"].shape[1]
            inputs = inputs_of(plain, row["ids"], row["attention"])
            logits = model(**inputs, **({"logits_to_keep": length + 1} if takes_number else {})).logits
            yield logits[:, -length - 1 : -1] / self.args.temperature, row["ids"][:, -length:]

    def _values(self, critic: Any, row: dict[str, Tensor]) -> Tensor:
        inputs = inputs_of(plain_model(self.critic.model), row["ids"], row["attention"])
        return critic(**inputs)[:, -row["mask"].shape[1] - 1 : -1]

    def _policy_loss(self, row: dict[str, Tensor], tokens: Tensor, model: Any) -> tuple[Tensor, dict[str, Tensor]]:
        log_probs = token_log_probs(*next(self._logits(model, [row])))
        losses, is_clipped = policy_losses(log_probs, row["log_probs"], row["advantages"], self.args.clip_range)
        loss = (losses * row["mask"]).sum() / tokens
        return loss, {"policy_loss": loss, "clip_fraction": (is_clipped * row["mask"]).sum() / tokens}

    def _value_loss(self, row: dict[str, Tensor], tokens: Tensor, model: Any) -> tuple[Tensor, dict[str, Tensor]]:
        losses = value_losses(self._values(model, row), row["values"], row["returns"], self.args.value_clip_range)
        loss = (losses * row["mask"]).sum() / tokens
        return loss, {"value_loss": loss}

    def _ptx_loss(self, number: int, model: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """γ E[−log π(x)] over pre-training text (arXiv 2203.02155, equation 2)."""
        rows = [dict(row) for row in self._next(self.ptx_rows, self.args.ptx_batch_size, number)]
        loss = model(**self.collate_ptx(rows).to(self.accelerator.device), use_cache=False).loss
        return self.args.ptx_coefficient * loss, {"ptx_loss": self.args.ptx_coefficient * loss}

    def _optimize(self, name: str, losses: Sequence[partial[tuple[Tensor, dict[str, Tensor]]]]) -> dict[str, float]:
        """One optimizer step on the sum of the losses."""
        model, optimizer, _ = self.trained[name]
        found: dict[str, float] = {}
        for number, compute in enumerate(losses, start=1):
            with contextlib.nullcontext() if number == len(losses) else self.accelerator.no_sync(model):
                loss, measured = compute(model)
                stop_at_non_finite(loss, compute.args[0], self.args, self.state.global_step)
                self.accelerator.backward(loss)
            for key, value in measured.items():
                found[key] = found.get(key, 0.0) + value.item()
        norm = self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm or math.inf)
        if not torch.isfinite(norm) and self.accelerator.scaler is None:  # which leaves such a step out
            raise FloatingPointError(f"the {name}'s gradient is not finite at step {self.state.global_step}")
        optimizer.step()
        optimizer.zero_grad()
        return found

    def _mean(self, values: Tensor, mask: Tensor) -> Tensor:
        """The mean over the tokens of all processes."""
        return self.accelerator.reduce((values * mask).sum(), "sum") / self.accelerator.reduce(mask.sum(), "sum")

    def _adapt_kl_coefficient(self, kl: float) -> None:
        args, done = self.args, (self.state.global_step + 1) / self.state.max_steps
        if args.kl_target is not None:
            self.kl_coefficient = adapted_kl_coefficient(self.kl_coefficient, kl, args.kl_target)
        elif args.final_kl_coefficient is not None:
            self.kl_coefficient = args.kl_coefficient + done * (args.final_kl_coefficient - args.kl_coefficient)

    # --- what a training leaves ---

    def _log(self) -> None:
        rates = {f"{name}_learning_rate": one[2].get_last_lr()[0] for name, one in self.trained.items()}
        logs = _means(self.pending) | rates | {"kl_coefficient": self.kl_coefficient, "epoch": self.state.epoch}
        self.pending = []
        self.state.log_history.append(logs | {"step": self.state.global_step})
        self._tell("on_log", logs=logs)

    def _save_checkpoint(self) -> None:
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed while it wrote
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(folder))
        if self.args.should_save:
            self.state.save_to_json(str(folder / STATE_FILE))
        self._tell("on_save")
        if self.args.should_save and self.args.save_total_limit:
            for old in complete_checkpoints(Path(self.args.output_dir))[: -self.args.save_total_limit]:
                shutil.rmtree(old)

    def save_model(self, folder: str) -> None:
        """The actor (with PEFT: its adapter) in the folder, the critic in its subfolder `critic`."""
        if self.args.should_save:
            self.model.save_pretrained(folder)
            self.critic.model.save_pretrained(Path(folder, CRITIC_FOLDER))


def _split(batch: Mapping[str, Tensor], parts: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    return [{name: values[part.to(values.device)] for name, values in batch.items()} for part in parts]


def _means(measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each number over those that have it."""
    lists: dict[str, list[float]] = {}
    for one in measured:
        for name, value in one.items():
            lists.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in lists.items()}


def _steps(args: PPOConfig, queries: int) -> int:
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(args.num_train_epochs * queries / (args.queries_per_device * args.world_size))


def _leave_frozen_weights_out(models: list[nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
    """Of a checkpoint with an adapter: the model it adapts is where the training took it from."""
    for model, state in zip(models, weights, strict=True):
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                state.pop(name, None)
