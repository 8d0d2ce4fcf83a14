"""What is measured on the models: prefill, its memory, decoding, a training step."""

import math
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from hf_cnllm.families import Shape

from .machine import Machine, synchronize
from .measure import CLOCKS, Times, peak_growth, take_turns
from .subjects import (
    Subject,
    attention_flops,
    auto_class_for,
    linear_flops_per_token,
    llama_config,
    weight_bytes,
)


@dataclass(frozen=True)
class Row:
    """One line of the report.

    Attributes:
        value, reference_value: medians over the rounds.
        ratio: median over the rounds of their own ratios, time by time: below 1 is faster.
        quartiles: the lower and the upper one of the same ratios.
        rounds: name -> what each round measured.
    """

    task: str
    family: str
    setting: str
    value: float | None = None
    unit: str = "s"
    reference: str | None = None
    reference_value: float | None = None
    ratio: float | None = None
    quartiles: tuple[float, float] | None = None
    flop_share: float | None = None
    bandwidth_share: float | None = None
    ratio_per_flop: float | None = None
    peak_mib: float | None = None
    reference_peak_mib: float | None = None
    backend: str = ""
    dtype: str = ""
    error: str | None = None
    rounds: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def from_times(cls, times: Times, name: str, reference: str, **fields) -> "Row":
        low, ratio, high = times.ratio(name, reference)
        return cls(
            value=times.median(name),
            reference=reference,
            reference_value=times.median(reference),
            ratio=ratio,
            quartiles=(low, high),
            rounds={name: times.seconds[name], reference: times.seconds[reference]},
            **fields,
        )


class Bench:
    """A family and the Llama of its shape, on one backend in one dtype; `work` are the command's arguments."""

    def __init__(self, name: str, subject: Subject, backend: str, dtype: str, work: Namespace, machine: Machine):
        self.name, self.subject, self.work, self.machine = name, subject, work, machine
        self.backend, self.dtype = backend, dtype
        self.shape, self.device = work.shape, work.device

    def build(self, config) -> PreTrainedModel:
        torch.manual_seed(0)
        model = auto_class_for(config).from_config(
            config, attn_implementation=self.backend, dtype=getattr(torch, self.dtype)
        )
        return model.to(self.device)

    @cached_property
    def models(self) -> dict[str, PreTrainedModel]:
        configs = {self.name: self.subject.config(self.shape), "llama": llama_config(self.subject, self.shape)}
        return {name: self.build(config).eval() for name, config in configs.items()}

    def input_ids(self, batch: int, length: int, shape: Shape | None = None) -> torch.Tensor:
        ids = self.subject.input_ids(shape or self.shape, batch, length, torch.Generator().manual_seed(0))
        return ids.to(self.device)

    def take_turns(self, runs: Mapping[str, Callable[[], object]]) -> Times:
        return take_turns(runs, self.work.rounds, self.device, CLOCKS[self.work.clock])

    def row(self, times: Times, reference: str = "llama", **fields) -> Row:
        return Row.from_times(
            times, self.name, reference, family=self.name, backend=self.backend, dtype=self.dtype, **fields
        )

    @torch.inference_mode()
    def prefill(self) -> Iterator[Row]:
        """One forward pass over a prompt, with its cache and the last position's logits."""
        for length in self.work.lengths:
            input_ids = self.input_ids(1, length)
            runs = {name: self._prefill_once(model, input_ids) for name, model in self.models.items()}
            times = self.take_turns(runs)
            flops, llama_flops = (
                length * linear_flops_per_token(model) + attention_flops(self.shape, pairs)
                for model, pairs in zip(
                    self.models.values(),
                    (self.subject.attended_pairs(length), length * (length + 1) / 2),
                    strict=True,
                )
            )
            peaks = {name: peak_growth(run, self.device) for name, run in runs.items()}
            yield self.row(
                times,
                task="prefill",
                setting=f"{length} tokens",
                flop_share=self.machine.flop_share(flops / times.median(self.name), self.dtype),
                ratio_per_flop=times.ratio(self.name, "llama")[1] * llama_flops / flops,
                peak_mib=peaks[self.name],
                reference_peak_mib=peaks["llama"],
            )

    @torch.inference_mode()
    def memory(self) -> Iterator[Row]:
        """The exponent with which the peak of a prefill grows from the shortest to the longest length: 1 is linear."""
        shortest, longest = min(self.work.lengths), max(self.work.lengths)
        if shortest == longest:
            return
        slopes = {}
        for name, model in self.models.items():
            self._prefill_once(model, self.input_ids(1, 64))()
            peaks = [
                peak_growth(self._prefill_once(model, self.input_ids(1, length)), self.device)
                for length in (shortest, longest)
            ]
            least, most = (peak or 0 for peak in peaks)
            if min(least, most) < 1:  # MiB: not told by this system, or too little to tell
                return
            slopes[name] = math.log(most / least) / math.log(longest / shortest)
        yield Row(
            task="memory",
            family=self.name,
            backend=self.backend,
            dtype=self.dtype,
            setting=f"{shortest} to {longest} tokens",
            value=slopes[self.name],
            unit="slope",
            reference="llama",
            reference_value=slopes["llama"],
        )

    def _prefill_once(self, model, input_ids):
        attention_mask = torch.ones_like(input_ids)  # as `generate` makes it; without one GLM is causal
        return lambda: model(input_ids=input_ids, attention_mask=attention_mask, use_cache=True, logits_to_keep=1)

    def decode(self) -> Iterator[Row]:
        """A step of greedy `generate` with the default cache: the median step of each round."""
        for batch in self.work.batch_sizes:
            input_ids = self.input_ids(batch, self.work.prompt)
            runs = {name: self._median_step(model, input_ids) for name, model in self.models.items()}
            times = self.take_turns(runs)
            model = self.models[self.name]
            tokens = batch * (self.work.prompt + self.work.new_tokens // 2)
            heads = self.subject.key_value_heads(self.shape)
            head_dim = self.shape.hidden_size // self.shape.heads
            cache_bytes = 2 * self.shape.layers * tokens * heads * head_dim * model.dtype.itemsize
            read = weight_bytes(model) + cache_bytes
            yield self.row(
                times,
                task="decode",
                setting=f"batch {batch}",
                unit="s/step",
                bandwidth_share=self.machine.bandwidth_share(read / times.median(self.name)),
            )

    def _median_step(self, model, input_ids):
        steps = self.work.new_tokens

        def run() -> float:
            clock = StepClock(self.device, CLOCKS[self.work.clock])
            model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=steps + 1,
                min_new_tokens=steps + 1,
                do_sample=False,
                logits_processor=LogitsProcessorList([clock]),
            )
            return clock.median_step()

        return run

    def train(self) -> Iterator[Row]:
        """Forward, backward and AdamW on one sequence, at a vocabulary where the logits weigh."""
        shape = self.shape._replace(vocab_size=self.work.train_vocab)
        input_ids = self.input_ids(1, self.work.train_tokens, shape)
        chunked = Training(self.build(self.subject.config(shape)), input_ids)
        llama = Training(self.build(llama_config(self.subject, shape)), input_ids)
        runs = {
            self.name: chunked.step,
            "plain loss": chunked.step_with_logits,
            "llama": llama.step,
        }
        times = self.take_turns(runs)
        peaks = {name: peak_growth(run, self.device) for name, run in runs.items()}
        setting = f"{self.work.train_tokens} tokens, vocabulary {self.work.train_vocab}"
        for reference in ("plain loss", "llama"):
            yield self.row(
                times,
                reference,
                task="train",
                setting=setting,
                unit="s/step",
                peak_mib=peaks[self.name],
                reference_peak_mib=peaks[reference],
            )


class StepClock(LogitsProcessor):
    """Notes the time whenever `generate` has the logits of a step."""

    def __init__(self, device: torch.device, clock: Callable[[], float]):
        self.device = device
        self.clock = clock
        self.marks: list[float] = []

    def __call__(self, input_ids, scores):
        synchronize(self.device)
        self.marks.append(self.clock())
        return scores

    def median_step(self) -> float:
        steps = sorted(after - before for before, after in zip(self.marks, self.marks[1:], strict=False))
        return steps[len(steps) // 2]


class Training:
    """A model with its optimizer; between steps weights, gradients and optimizer state stay in memory."""

    def __init__(self, model: PreTrainedModel, input_ids: torch.Tensor):
        self.model = model.train()
        self.input_ids = input_ids
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(input_ids=self.input_ids, labels=self.input_ids, use_cache=False).loss.backward()
        self.optimizer.step()

    def step_with_logits(self) -> None:
        chunk_size, self.model.config.loss_chunk_size = self.model.config.loss_chunk_size, None
        try:
            self.step()
        finally:
            self.model.config.loss_chunk_size = chunk_size


MODEL_TASKS = {"prefill": Bench.prefill, "memory": Bench.memory, "decode": Bench.decode, "train": Bench.train}
