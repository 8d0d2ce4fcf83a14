"""Run by `test_readers.py` in a process of its own, where hf_cnllm cannot be imported: what plain transformers makes of folders.

    python reader_without_package.py OUTCOMES SAVED... -- COPIES...

Each folder holds `expected.pt`, what the models of this package gave. Writes one JSON object: for SAVED the doors that did not
end in an error naming hf_cnllm, and for COPIES what was not as expected.
"""

import contextlib
import io
import json
import sys
from pathlib import Path

sys.modules["hf_cnllm"] = None  # as if it were not installed

import torch  # noqa: E402
import transformers  # noqa: E402

AUTO_CLASSES = ("AutoConfig", "AutoTokenizer", "AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM")


def silent_doors(folder: Path) -> list[str]:
    doors = {name: getattr(transformers, name).from_pretrained for name in AUTO_CLASSES}
    doors["pipeline"] = lambda path, **options: transformers.pipeline("text-generation", model=str(path), **options)
    found = []
    for name, load in doors.items():
        for options in ({}, {"trust_remote_code": False}, {"trust_remote_code": True}):
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    loaded = load(folder, **options)
                found.append(f"{name} {options}: {type(loaded).__name__}")
            except Exception as error:
                if "hf_cnllm" not in str(error) or "pip install hf-cnllm" not in str(error):
                    found.append(f"{name} {options}: {error!r}")
    return found


def faults(folder: Path, again: Path | None) -> list[str]:
    """What a copy gives otherwise than expected; it is saved into `again` and looked at there, too."""
    expected = torch.load(folder / "expected.pt")
    model = getattr(transformers, expected["auto_class"]).from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    checks = {
        "module": type(model).__module__.startswith("transformers_modules."),
        "ids": tokenizer(expected["text"])["input_ids"] == expected["ids"],
        "logits": torch.equal(model(**expected["inputs"]).logits, expected["logits"]),
        "generated": torch.equal(model.generate(**expected["prompt"], **expected["options"]), expected["generated"]),
        "chat": expected["chat"] is None
        or tokenizer.apply_chat_template(expected["messages"], tokenize=False) == expected["chat"],
    }
    for name in model.config.auto_map.keys() - {"AutoConfig"}:
        other = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)
        checks[name] = type(other).__module__.startswith("transformers_modules.")
    found = [f"{folder.name}: {name}" for name, holds in checks.items() if not holds]
    if again is not None:
        model.save_pretrained(again)
        tokenizer.save_pretrained(again)
        (again / "expected.pt").write_bytes((folder / "expected.pt").read_bytes())
        found += faults(again, None)
    return found


def main(outcomes: str, *folders: str) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    split = folders.index("--")
    with torch.no_grad():
        result = {
            "silent": {folder: silent_doors(Path(folder)) for folder in folders[:split]},
            "faults": {folder: faults(Path(folder), Path(f"{folder}-again")) for folder in folders[split + 1 :]},
        }
    Path(outcomes).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
