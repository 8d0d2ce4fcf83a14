"""`hf-cnllm doctor`: whether this machine's libraries and this package work together. Bug reports start with its output.

Prints the versions of the stack, what does not fit, and, on models of a few thousand random weights of every family, what
holds. Nothing is downloaded; half a minute on two cores.
"""

import argparse
import importlib.util
import json
import platform
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence

from .._compat import TESTED, logging
from .._contract import broken_promises
from .._stack import LIBRARIES, installed_version, own_version, unmet_requirements
from ..families import FAMILIES, Family, Shape
from . import one_line

TOLERANCE, HALF_PRECISION_TOLERANCE = 2e-5, 5e-2
SHAPE = Shape(hidden_size=32, layers=2, heads=4, ffn_size=64, vocab_size=80)
# Dynamic NTK acts on the prompts here. LogN counts columns, as the original does, so that batch and single differ by design.
SPECIAL_FIELDS = {"qwen": {"seq_length": 8, "use_logn_attn": False}}


class Patient(NamedTuple):
    """A tiny model of one architecture."""

    family: Family
    architecture: str

    @property
    def prompt_end(self) -> tuple[str, ...]:
        return self.family.architectures[self.architecture].prompt_end

    def model(self) -> Any:
        """The same random weights every time; large ones, so that attention makes a difference."""
        fields = SPECIAL_FIELDS.get(self.architecture, {})
        config = self.family.make_config(self.architecture, SHAPE, initializer_range=0.2, **fields)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(transformers, self.family.generates_with).from_config(config)
        model.generation_config.eos_token_id = None
        return model.eval()

    def prompt(self, length: int = 9) -> torch.Tensor:
        """[1, length] token ids, none of them 0."""
        config = self.family.make_config(self.architecture, SHAPE)
        end = [getattr(config, name) for name in self.prompt_end]
        return torch.tensor([[20 + 7 * i % 40 for i in range(length - len(end))] + end])

    def prompts(self, padding_side: str) -> torch.Tensor:
        """[2, 9] token ids: a prompt of 9 tokens and one of 6, padded by 0."""
        return pad_sequence([self.prompt(9)[0], self.prompt(6)[0]], batch_first=True, padding_side=padding_side)

    def generate(self, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        """The ids with four more tokens."""
        options = {"max_new_tokens": 4, "do_sample": False, "disable_compile": True, **options}
        return self.model().generate(ids, attention_mask=(ids != 0).long(), **options)


PATIENTS = {name: Patient(family, name) for family in FAMILIES for name in family.architectures}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the findings; 1 if something does not hold."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    report = examine()
    print(json.dumps(report, indent=2) if args.json else as_text(report))
    results = [result for row in report["models"].values() for result in row.values()]
    failed = report["unmet requirements"] or report["broken promises"] or any(r.startswith("FAIL") for r in results)
    return 1 if failed else 0


def examine() -> dict[str, Any]:
    """Everything that `doctor` prints."""
    return {
        "versions": versions(),
        "unmet requirements": unmet_requirements(),
        "broken promises": broken_promises(),
        "models": {
            name: {title: outcome(check, patient) for title, check in CHECKS.items()}
            for name, patient in PATIENTS.items()
        },
    }


def as_text(report: dict[str, Any]) -> str:
    lines = [f"{name:<16} {value}" for name, value in report["versions"].items()]
    for title in ("unmet requirements", "broken promises"):
        lines += ["", f"{title}: {'none' if not report[title] else ''}", *(f"  {text}" for text in report[title])]
    for model, results in report["models"].items():
        lines += ["", model, *(f"  {check:<30} {result}" for check, result in results.items())]
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Library -> its version, and what it runs on."""
    found = {"hf-cnllm": own_version(), "python": platform.python_version()}
    found |= {library: version for library in LIBRARIES if (version := installed_version(library)) is not None}
    found["tested with"] = TESTED
    found["runs on"] = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    return found


# --- the checks -------------------------------------------------------------------------------------------------------

# What a check found, what it expected, and how far the two may be apart if that is not `TOLERANCE`.
Check = Callable[[Patient], tuple]


class NotApplicable(Exception):
    """Why a check makes no sense here."""


def outcome(check: Check, patient: Patient) -> str:
    """`ok`, `n/a: …` or `FAIL: …`, on one line."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found, expected, tolerance = (*check(patient), TOLERANCE)[:3]
        difference = (found.float() - expected.float()).abs().max().item()
        return "ok" if difference <= tolerance else f"FAIL: differs by {difference:.2g}"
    except NotApplicable as reason:
        return f"n/a: {reason}"
    except Exception as error:
        return f"FAIL: {one_line(error)}"


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, attention_mask=(ids != 0).long(), use_cache=False).logits


def _packing(patient: Patient) -> tuple:
    model, first, second = patient.model(), patient.prompt(5), patient.prompt(7)
    if patient.prompt_end:  # prefix models are told by the mask
        said = {"attention_mask": torch.tensor([[1] * 5 + [2] * 7])}
    else:
        said = {"position_ids": torch.cat([torch.arange(5), torch.arange(7)])[None]}
    packed = model(torch.cat([first, second], dim=1), use_cache=False, **said).logits
    return packed, torch.cat([logits_of(model, ids) for ids in (first, second)], dim=1)


def _saving(patient: Patient) -> tuple:
    model, ids = patient.model(), patient.prompt()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return logits_of(type(model).from_pretrained(folder).eval(), ids), logits_of(model, ids), 0


@torch.enable_grad()
def _chunked_loss(patient: Patient) -> tuple:
    model, ids = patient.model().train(), patient.prompt()
    losses = []
    for model.config.loss_chunk_size in (2, None):
        losses.append(model(ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss.detach())
    return tuple(losses)


def _attention(patient: Patient, backend: str) -> tuple:
    half = backend.startswith("flash")
    if half and (importlib.util.find_spec("flash_attn") is None or not torch.cuda.is_available()):
        raise NotApplicable("flash-attn or a CUDA device is missing")
    model, ids = patient.model(), patient.prompt()
    if half:
        model, ids = model.to("cuda", torch.bfloat16), ids.cuda()
    model.set_attn_implementation("eager")
    expected = logits_of(model, ids)
    model.set_attn_implementation(backend)
    with torch.compiler.set_stance("force_eager"):  # compiling takes longer than all else and computes the same
        return logits_of(model, ids), expected, HALF_PRECISION_TOLERANCE if half else TOLERANCE


CHECKS: dict[str, Check] = {
    "cached = uncached": lambda p: (p.generate(p.prompt()), p.generate(p.prompt(), use_cache=False)),
    "static cache": lambda p: (p.generate(p.prompt(), cache_implementation="static"), p.generate(p.prompt())),
    "padding": lambda p: (logits_of(p.model(), p.prompts("right"))[1, :6], logits_of(p.model(), p.prompt(6))[0]),
    "batch = single": lambda p: (p.generate(p.prompts("left"))[1, 3:], p.generate(p.prompt(6))[0]),
    "packing": _packing,
    "saving": _saving,
    "chunked loss": _chunked_loss,
    **{
        f"attention: {backend}": partial(_attention, backend=backend)
        for backend in ("eager", "sdpa", "flex_attention", "flash_attention_2")
    },
}
