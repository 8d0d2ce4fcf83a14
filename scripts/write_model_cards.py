"""Writes `model_cards/`: a card for every published checkpoint, from `model_cards/source/` and the package's own table.

    python scripts/write_model_cards.py

`checkpoints.json` says line -> size -> facts, license if it is not the line's, checkpoints with what they are for, and the
sources of license and facts;
`<line>.md` is what all cards of a line say; `card.md` is the template.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from hf_cnllm.families import FAMILIES, LINES

CARDS = Path(__file__).parents[1] / "model_cards"
SOURCE = CARDS / "source"
LANGUAGES = {"glm": ["zh"]}
CHAT = """messages = [{"role": "user", "content": "解释一下“温故而知新”"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")"""
GENERATE = "output = model.generate(**inputs.to(model.device), max_new_tokens=128)"
USAGE = {
    "chat": f"{CHAT}\n{GENERATE}",
    "base": f'inputs = tokenizer("登鹳雀楼->王之涣\\n夜雨寄北->", return_tensors="pt")\n{GENERATE}',
    "blanks": """inputs = tokenizer("凯旋门位于意大利米兰市古城堡旁。1807年为纪念[MASK]而建。", return_tensors="pt")
inputs = tokenizer.build_inputs_for_generation(inputs, max_gen_length=64).to(model.device)
output = model.generate(**inputs, max_new_tokens=64, eos_token_id=tokenizer.eop_token_id)""",
    "converted": """inputs = tokenizer.encode_blanks("凯旋门位于意大利米兰市古城堡旁。1807年为纪念[MASK]而建。", return_tensors="pt")
inputs = tokenizer.build_inputs_for_generation(inputs).to(model.device)
output = model.generate(**inputs, max_new_tokens=64)""",
    # The generation configuration of a base model ends at no ChatML token; that of a chat model may lack one.
    "qwen chat": CHAT
    + """
end = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
output = model.generate(**inputs.to(model.device), max_new_tokens=128, eos_token_id=end)""",
}


def cards() -> Iterator[tuple[str, ModelCard]]:
    """Name of the file and card of every checkpoint."""
    template = (SOURCE / "card.md").read_text(encoding="utf-8")
    for line_name, sizes in json.loads((SOURCE / "checkpoints.json").read_text(encoding="utf-8")).items():
        line = LINES[line_name]
        family = next(family for family in FAMILIES if line_name in family.lines)
        about = (SOURCE / f"{line_name}.md").read_text(encoding="utf-8").strip()
        for size, row in sizes.items():
            license_name, license_text = row.get("license", (line.license_name, line.license))
            for repo_id, kind in row["checkpoints"].items():
                name = repo_id.split("/")[1]
                metadata = ModelCardData(
                    language=LANGUAGES.get(line_name, ["zh", "en"]),
                    library_name="transformers",
                    pipeline_tag="text-generation",
                    license="other",
                    license_name=license_name,
                    license_link=row.get("home", "https://huggingface.co/") + repo_id,
                    base_model=repo_id,
                    tags=["hf_cnllm", line_name, *(["conversational"] if kind == "chat" else [])],
                )
                yield (
                    f"{name}.md",
                    ModelCard.from_template(
                        metadata,
                        template_str=template,
                        name=name,
                        repo_id=repo_id,
                        title=line.title,
                        size=size,
                        auto_class=family.generates_with,
                        usage=USAGE.get(f"{line_name} {kind}", USAGE[kind]),
                        facts={key: _shown(value) for key, value in row["facts"].items()},
                        about=about,
                        license=license_text,
                        home=row.get("home", "https://huggingface.co/"),
                    ),
                )


def _shown(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def main() -> None:
    for name, card in cards():
        card.save(CARDS / name)
        print(CARDS / name)


if __name__ == "__main__":
    main()
