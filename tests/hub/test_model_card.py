"""Cards: what is rendered for a fine-tuned model, and the ones that come with the project."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.pipelines import get_supported_tasks

import write_model_cards
from goldens import GOLDENS
from hf_cnllm.cli import USER_ERROR, main
from hf_cnllm.demo.tiny_checkpoints import TINY_FAMILIES, TINY_VARIANTS, write_tiny_checkpoint
from hf_cnllm.families import LINES
from hf_cnllm.hub.model_card import create_model_card, fine_tuned_model_card, is_repo_id

CARDS = Path(__file__).parents[2] / "model_cards"


def test_a_card_says_what_was_done(tmp_path):
    card = fine_tuned_model_card(
        "My chat model",
        "baichuan2",
        base_model="baichuan-inc/Baichuan2-7B-Base",
        model_path="me/my-model",
        training={"epochs": 3},
        results={"loss": 0.25},
        samples=[{"question": "你好", "reply": "a | b\n<script>"}],
        loss_curve="loss.png",
    )
    card.save(tmp_path / "README.md")
    read = ModelCard.load(tmp_path / "README.md")
    assert read.data.base_model == "baichuan-inc/Baichuan2-7B-Base"
    assert (read.data.license, read.data.license_name) == ("other", "baichuan2-community-license")
    assert read.data.tags == ["hf_cnllm", "baichuan2"]
    for part in (
        'from_pretrained("me/my-model")',
        "| epochs | 3 |",
        "| loss | 0.25 |",
        "(loss.png)",
        "Community License",
    ):
        assert part in read.text
    assert "| 你好 | a \\| b \\<script\\> |" in read.text


def test_weights_of_ones_own_are_under_ones_own_license():
    card = fine_tuned_model_card("Tiny", "qwen")
    assert card.data.license == "apache-2.0" and card.data.base_model is None
    assert "## Samples" not in card.text and "## Training" not in card.text


def test_a_local_path_is_not_given_as_a_hub_name():
    assert fine_tuned_model_card("Mine", "glm", base_model="/data/glm").data.base_model is None


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match="origin must be one of"):
        fine_tuned_model_card("x", "bloom")


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """A Trainer after two steps, with a checkpoint of them."""
    folder = tmp_path_factory.mktemp("trainer")
    write_tiny_checkpoint("qwen", folder / "checkpoint")
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint")
    model.name_or_path = "Qwen/Qwen-7B"
    row = {"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}
    arguments = TrainingArguments(
        str(folder / "run"), max_steps=2, logging_steps=1, eval_strategy="steps", eval_steps=2, save_steps=2,
        learning_rate=0.25, report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=[row] * 4, eval_dataset=[row])
    trainer.train()
    return trainer


def test_a_trainer_fills_in_its_card(trainer):
    card = create_model_card(
        trainer.model, model_path="me/mine", trainer=trainer, datasets=["me/data"], evaluated_on="me/test"
    )
    assert card.data.base_model == "Qwen/Qwen-7B" and card.data.datasets == ["me/data"]
    assert {result.metric_type for result in card.data.eval_results} == {"eval_loss"}
    assert "| learning\\_rate | 0.25 |" in card.text and "| step | training loss | evaluation loss |" in card.text
    assert "\n# mine\n" in card.text and "me/mine" in card.text
    again = ModelCard(str(card))
    assert again.data.eval_results == card.data.eval_results


def test_the_command_writes_the_card_of_a_trainers_checkpoint(trainer, capsys):
    folder = Path(trainer.args.output_dir, "checkpoint-2")
    assert main(["card", str(folder)]) == USER_ERROR and "add --overwrite" in capsys.readouterr().err
    options = ["--overwrite", "--base-model", "Qwen/Qwen-7B", "--result", "accuracy=0.5", "--repo", "me/mine"]
    assert main(["card", str(folder), *options]) == 0
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "Qwen/Qwen-7B" and "| accuracy | 0.5 |" in card.text
    assert "| steps | 2 |" in card.text and "| step | training loss | evaluation loss |" in card.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--base-model", "/some/path"], "base_model must be a name on the Hub"),
        (["--evaluated-on", "my data"], "evaluated_on must be a name on the Hub"),
        (["--loss-curve", "none.png"], "--loss-curve: there is no file"),
    ],
)
def test_what_the_command_cannot_use_is_one_line(options, message, trainer, capsys):
    folder = Path(trainer.args.output_dir, "checkpoint-2")
    assert main(["card", str(folder), "--overwrite", *options]) == USER_ERROR
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_full_disk_leaves_the_card_that_was_there(trainer, capsys, files_up_to):
    folder = Path(trainer.args.output_dir, "checkpoint-2")
    before = (folder / "README.md").read_text()
    with files_up_to(100):
        assert main(["card", str(folder), "--overwrite"]) == USER_ERROR
    assert "File too large" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == before and not list(folder.glob(".*"))


@pytest.mark.parametrize("name", ["adapter_config.json", "trainer_state.json"])
def test_a_damaged_file_is_named(name, trainer, tmp_path, capsys):
    shutil.copytree(Path(trainer.args.output_dir, "checkpoint-2"), tmp_path / "model")
    (tmp_path / "model" / name).write_text("{")
    assert main(["card", str(tmp_path / "model"), "--overwrite"]) == USER_ERROR
    assert f"{name} is damaged" in capsys.readouterr().err


def test_no_folder_and_no_pair(tmp_path, capsys):
    assert main(["card", str(tmp_path / "none")]) == USER_ERROR and "is not a folder" in capsys.readouterr().err
    assert main(["card", str(tmp_path)]) == USER_ERROR and "it has neither config.json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["card", str(tmp_path), "--result", "accuracy"])
    assert "is not NAME=VALUE" in capsys.readouterr().err


def test_a_model_is_not_its_own_base(trainer):
    assert create_model_card(trainer.model, model_path="Qwen/Qwen-7B").data.base_model is None


@pytest.mark.parametrize(
    ("checkpoint", "auto_class", "task"),
    [
        ("qwen", "AutoModelForCausalLM", "CAUSAL_LM"),
        ("qwen", "AutoModelForCausalLM", None),
        ("qwen", "AutoModelForSequenceClassification", "SEQ_CLS"),
        ("baichuan_7b", "AutoModelForTokenClassification", "TOKEN_CLS"),
        ("glm", "AutoModelForSeq2SeqLM", None),  # as the recipes train it
        ("glm", "AutoModelForSeq2SeqLM", "CAUSAL_LM"),
        ("glm", "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
    ],
)
@torch.no_grad()
def test_the_card_of_an_adapter_says_what_loads_it(checkpoint, auto_class, task, tmp_path):
    base = getattr(transformers, auto_class).from_pretrained(GOLDENS / checkpoint)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(task_type=task, init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(20, 28)[None]
    expected = adapted.base_model(ids).logits
    for source in (adapted, tmp_path / "adapter"):
        text = create_model_card(source, model_path=str(tmp_path / "adapter")).text
        lines = [line for line in text.splitlines() if re.match(r"import|from|model =", line)]
        names = {}
        exec("\n".join(lines), names)
        assert torch.equal(names["model"].eval()(input_ids=ids).logits, expected)


def test_saving_leaves_somebodys_card_alone(trainer, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    trainer.model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_somebody_elses_model_has_no_card_here():
    with pytest.raises(ValueError, match="no model of hf_cnllm"):
        create_model_card(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=8)))


# --- the cards that come with the project -----------------------------------------------------------------------------

PUBLISHED = dict(write_model_cards.cards())


def test_the_cards_are_those_that_the_script_writes():
    assert {path.name: path.read_text() for path in CARDS.glob("*.md")} == {
        name: str(card) for name, card in PUBLISHED.items()
    }
    assert {card.data.tags[1] for card in PUBLISHED.values()} == set(LINES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_card_is_what_the_hub_takes(name):
    card = ModelCard.load(CARDS / name)
    assert is_repo_id(card.data.base_model) and card.data.base_model.endswith("/" + name.removesuffix(".md"))
    assert card.data.library_name == "transformers" and card.data.pipeline_tag in get_supported_tasks()
    assert card.data.license == "other" and re.fullmatch(r"[a-z0-9-]+", card.data.license_name)
    assert card.data.license_link.endswith(card.data.base_model)
    assert set(card.data.language) <= {"zh", "en"} and len(set(card.data.tags)) == len(card.data.tags)
    for part in ("import hf_cnllm", "## Usage", "What differs", "## License", "## Limits"):
        assert part in card.text


EXAMPLES = {
    "baichuan": "Baichuan2-7B-Chat", "qwen": "Qwen-7B-Chat", "chatglm": "chatglm-6b", "chatglm2": "chatglm2-6b",
    "chatglm3": "chatglm3-6b-base", "glm": "glm-large-chinese",
    "glm130b": "GLM-130B",
}  # fmt: skip


@pytest.mark.parametrize("family", EXAMPLES)
def test_the_usage_runs(family, tmp_path, capsys):
    write_tiny_checkpoint(family, tmp_path / "checkpoint")
    card = PUBLISHED[f"{EXAMPLES[family]}.md"]
    usage = card.text.split("```python\n")[1].split("```")[0]
    assert len([line for line in usage.splitlines() if line.strip()]) <= 11
    usage = usage.replace(card.data.base_model, str(tmp_path / "checkpoint"))
    exec(compile(re.sub(r"max_new_tokens=\d+", "max_new_tokens=2", usage), family, "exec"), {})
    assert capsys.readouterr().out


@pytest.mark.parametrize("family", [*TINY_FAMILIES, *TINY_VARIANTS])
def test_the_usage_in_the_card_of_a_saved_folder_runs(family, tmp_path, monkeypatch, capsys):
    """Blanks are spelled as the tokenizer at hand spells them."""
    write_tiny_checkpoint(family, tmp_path / "checkpoint")
    create_model_card(tmp_path / "checkpoint").save(tmp_path / "checkpoint" / "README.md")
    usage = (tmp_path / "checkpoint" / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path / "checkpoint")
    exec(compile(re.sub(r"max_new_tokens=\d+", "max_new_tokens=2", usage), family, "exec"), {})
    assert capsys.readouterr().out
