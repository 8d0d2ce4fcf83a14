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
from typing import Any, NamedTuple

import torch
import transformers

from .._compat import TESTED, logging
from .._contract import broken_promises
from .._stack import LIBRARIES, installed_version, unmet_requirements
from ..auto import FAMILIES, Family, Shape

TOLERANCE = 2e-5
NEW_TOKENS = 4
BACKENDS = ("eager", "sdpa", "flex_attention", "flash_attention_2")


SHAPE = Shape(hidden_size=32, layers=2, heads=4, ffn_size=64, vocab_size=80)
SPECIAL_FIELDS = {"qwen": {"seq_length": 8}}  # dynamic NTK and LogN act on the prompts here


class NotApplicable(Exception):
    """Why a check makes no sense here."""


class Patient(NamedTuple):
    """A tiny model of one architecture."""

    family: Family
    architecture: str
    fields: dict[str, Any]

    def make(self) -> Any:
        """The model, with the same random weights every time; large ones, so that attention makes a difference."""
        config = self.family.make_config(self.architecture, SHAPE, initializer_range=0.2, **self.fields)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(transformers, self.family.generates_with).from_config(config)
        model.generation_config.eos_token_id = None
        return model.eval()

    def prompt(self, length: int) -> torch.Tensor:
        """[1, length] token ids."""
        config = self.family.make_config(self.architecture, SHAPE)
        end = [getattr(config, name) for name in self.family.architectures[self.architecture].prompt_end]
        body = torch.arange(length - len(end)) * 7 % 40 + 20
        return torch.cat([body, torch.tensor(end, dtype=torch.long)])[None]

    @property
    def is_prefix_lm(self) -> bool:
        return bool(self.family.architectures[self.architecture].prompt_end)


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
            name: {check: outcome(function, patient) for check, function in CHECKS.items()}
            for name, patient in patients().items()
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
    found = {"hf-cnllm": installed_version("hf-cnllm") or "(not installed)", "python": platform.python_version()}
    found |= {library: version for library in LIBRARIES if (version := installed_version(library)) is not None}
    found["tested with"] = TESTED
    found["runs on"] = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    return found


def patients() -> dict[str, Patient]:
    """A model of every architecture there is, by name."""
    return {
        name: Patient(family, name, SPECIAL_FIELDS.get(name, {}))
        for family in FAMILIES
        for name in family.architectures
    }


def outcome(check: Callable[[Patient], None], patient: Patient) -> str:
    """`ok`, `n/a: …` or `FAIL: …`, on one line."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(patient)
    except NotApplicable as reason:
        return f"n/a: {reason}"
    except Exception as error:
        return f"FAIL: {' '.join(str(error).split()) or type(error).__name__}"
    return "ok"


# --- the checks -------------------------------------------------------------------------------------------------------


def generate(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    options.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, disable_compile=True, **options)


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def same(found: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    difference = (found.float() - expected.float()).abs().max().item()
    if not difference <= tolerance:
        raise AssertionError(f"differs by {difference:.2g}")


def padded(patient: Patient, padding: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A prompt of 9 and one of 6 tokens, padded by so many on the left and the right, and their mask."""
    long, short = patient.prompt(9), patient.prompt(6)
    rows = [(long, (0, 0)), (short, padding)]
    ids, mask = (
        torch.cat([torch.nn.functional.pad(make(row), sides) for row, sides in rows])
        for make in (torch.clone, torch.ones_like)
    )
    return ids, mask


def _cached_decoding(patient: Patient) -> None:
    model, ids = patient.make(), patient.prompt(9)
    same(generate(model, ids), generate(model, ids, use_cache=False), 0)


def _static_cache(patient: Patient) -> None:
    model, ids = patient.make(), patient.prompt(9)
    same(generate(model, ids, cache_implementation="static"), generate(model, ids), 0)


def _padding(patient: Patient) -> None:
    model = patient.make()
    ids, mask = padded(patient, (0, 3))
    same(model(ids, attention_mask=mask, use_cache=False).logits[1, :6], logits_of(model, patient.prompt(6))[0])


def _batch_generation(patient: Patient) -> None:
    model = patient.make()
    ids, mask = padded(patient, (3, 0))
    same(generate(model, ids, attention_mask=mask)[1, 3:], generate(model, patient.prompt(6))[0], 0)


def _packing(patient: Patient) -> None:
    model, first, second = patient.make(), patient.prompt(5), patient.prompt(7)
    if patient.is_prefix_lm:
        said = {"attention_mask": torch.tensor([[1] * 5 + [2] * 7])}
    else:
        said = {"position_ids": torch.cat([torch.arange(5), torch.arange(7)])[None]}
    packed = model(torch.cat([first, second], dim=1), use_cache=False, **said).logits
    same(packed, torch.cat([logits_of(model, ids) for ids in (first, second)], dim=1))


def _saving(patient: Patient) -> None:
    model, ids = patient.make(), patient.prompt(9)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        same(logits_of(type(model).from_pretrained(folder).eval(), ids), logits_of(model, ids), 0)


def _chunked_loss(patient: Patient) -> None:
    model, ids = patient.make().train(), patient.prompt(9)
    losses = []
    for model.config.loss_chunk_size in (2, None):
        with torch.enable_grad():
            losses.append(model(ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss.detach())
    same(*losses)


def _on_backend(backend: str) -> Callable[[Patient], None]:
    def check(patient: Patient) -> None:
        half = backend.startswith("flash")
        if half and (importlib.util.find_spec("flash_attn") is None or not torch.cuda.is_available()):
            raise NotApplicable("flash-attn or a CUDA device is missing")
        model, ids = patient.make(), patient.prompt(9)
        if half:
            model, ids = model.to("cuda", torch.bfloat16), ids.cuda()
        model.set_attn_implementation("eager")
        expected = logits_of(model, ids)
        model.set_attn_implementation(backend)
        torch.compiler.set_stance("force_eager")  # compiling takes longer than all else and computes the same
        try:
            same(logits_of(model, ids), expected, 5e-2 if half else TOLERANCE)
        finally:
            torch.compiler.set_stance("default")

    return check


CHECKS: dict[str, Callable[[Patient], None]] = {
    "cached = uncached": _cached_decoding,
    "static cache": _static_cache,
    "padding": _padding,
    "batch = single": _batch_generation,
    "packing": _packing,
    "saving": _saving,
    "chunked loss": _chunked_loss,
    **{f"attention: {backend}": _on_backend(backend) for backend in BACKENDS},
}
