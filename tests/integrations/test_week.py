"""A newcomer's week, in the order in which it happens, with the commands of docs/tools.md: a checkpoint as on the Hub, a chat,
LoRA on one's own chats, DPO on what that saved, its card, the way to a stand-in of the Hub and back from there by name into a
server, an evaluation. In this process; and, slow, by the wheel in an environment of its own outside of the clone, which
`nox -s week` makes with nothing but the wheel and its extras. A further step is a test on the folder that it starts from."""

import importlib.util
import io
import json
import os
import site
import subprocess
import sys
import venv
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from hf_cnllm import infill
from hf_cnllm.cli import main
from hf_cnllm.demo.tiny_checkpoints import write_tiny_checkpoint
from hub_stand_in import serving
from openai_server import running_server

pytest.importorskip("trl")

# Family -> its output head, which is random at first. GLM, which has no chats, has a week of its own below.
HEADS = {
    "baichuan": "lm_head",
    "qwen": "lm_head",
    "chatglm": "lm_head",
    "chatglm2": "output_layer",
    "chatglm3": "output_layer",
}
FAMILIES = [pytest.param(name, marks=() if name == "baichuan" else pytest.mark.slow) for name in HEADS]
QUESTIONS = {"你是谁？": "我是小助手。", "一加一等于几？": "二。"}
SHARE_GPT = [
    {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
    for question, answer in QUESTIONS.items()
]
PREFERENCES = [
    {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": answer}],
        "rejected": [{"role": "assistant", "content": "不知道。"}],
    }
    for question, answer in QUESTIONS.items()
]
TRAINING = {
    "use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False, "save_strategy": "no",
    "logging_steps": 1, "disable_tqdm": True, "per_device_train_batch_size": 2,
}  # fmt: skip
LORA = """
import json, sys
import datasets, hf_cnllm, peft, trl

model, data, out, head, options = sys.argv[1:]
roles = {"human": "user", "gpt": "assistant"}
rows = [json.loads(line)["conversations"] for line in open(data, encoding="utf-8")]
chats = [[{"role": roles[turn["from"]], "content": turn["value"]} for turn in row] for row in rows]
trainer = trl.SFTTrainer(
    model,
    args=trl.SFTConfig(out, num_train_epochs=24, learning_rate=0.005, lr_scheduler_type="constant", assistant_only_loss=True, **json.loads(options)),
    train_dataset=datasets.Dataset.from_list([{"messages": chat} for chat in chats]),
    peft_config=peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", modules_to_save=[head]),
)
trainer.train()
losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
assert losses[-1] < 0.2, losses
model, tokenizer = trainer.model.merge_and_unload(), trainer.processing_class
model.generation_config.eos_token_id = hf_cnllm.reply_end_ids(tokenizer, model.generation_config)
model.save_pretrained(out)
tokenizer.save_pretrained(out)
"""


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


class Here:
    """Commands in this process."""

    python, environment = sys.executable, dict(os.environ)

    def __call__(self, *words, typed: str = "") -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [])
            patch.setattr(sys, "path", list(sys.path))
            patch.setattr(sys, "stdin", io.StringIO(typed))
            assert not main([str(word) for word in words])


class Wheel:
    """The command that the wheel brings, in a virtual environment that has nothing else but the libraries of this one. pip checks
    that they are all that the wheel and its extras ask for."""

    def __init__(self, folder: Path):
        venv.create(folder / "venv")
        self.folder, self.python = folder, folder / "venv" / "bin" / "python"
        self.environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        root = Path(__file__).parents[2]
        self.run(*pip, "wheel", "--no-deps", "--wheel-dir", folder, root)
        (wheel,) = folder.glob("*.whl")
        (installed,) = (folder / "venv").glob("lib/python*/site-packages")
        libraries = [path for path in sys.path if path.endswith("site-packages")] or site.getsitepackages()
        (installed / "libraries.pth").write_text("\n".join(libraries))
        extras = {"trl": "train", "openai": "serve", "lm_eval": "eval"}  # those that this environment has
        wanted = ",".join(extra for module, extra in extras.items() if importlib.util.find_spec(module))
        install = [*pip, "--python", self.python, "install", "--no-index"]
        self.run(*install, "--no-deps", "--ignore-installed", wheel)  # also where the libraries are beside the package
        self.run(*install, f"{wheel}[{wanted}]")

    def run(self, *command, **options) -> None:
        subprocess.run([str(word) for word in command], cwd=self.folder, env=self.environment, check=True, **options)

    def __call__(self, *words, typed: str = "") -> None:
        self.run(self.python.with_name("hf-cnllm"), *words, input=typed, text=True)


@pytest.fixture(scope="module", params=["here", pytest.param("wheel", marks=pytest.mark.slow)])
def hf_cnllm(request, tmp_path_factory):
    return Here() if request.param == "here" else Wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module", params=FAMILIES)
def original(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("week") / request.param
    write_tiny_checkpoint(request.param, folder)
    return folder


@pytest.fixture(scope="module")
def tuned(hf_cnllm, original):
    """What LoRA saved, merged."""
    folder = original.parent
    (folder / "lora.py").write_text(LORA)
    data = write_rows(folder / "chats" / "train.jsonl", SHARE_GPT)
    hf_cnllm("run", folder / "lora.py", original, data, folder / "tuned", HEADS[original.name], json.dumps(TRAINING))
    return folder / "tuned"


@pytest.fixture(scope="module")
def aligned(hf_cnllm, tuned):
    """What DPO made of it."""
    data = write_rows(tuned.parent / "preferences" / "train.jsonl", PREFERENCES)
    options = [word for name, value in TRAINING.items() for word in (f"--{name}", value)]
    options += ["--model_name_or_path", tuned, "--dataset_name", data.parent, "--output_dir", tuned.parent / "aligned"]
    hf_cnllm("run", "-m", "trl.scripts.dpo", *options, "--max_steps", 1, "--learning_rate", 1e-5)
    return tuned.parent / "aligned"


@pytest.fixture(scope="module")
def published(hf_cnllm, aligned):
    """The name that it has on the Hub now, with a card; the Hub; and an environment that finds it there, and nothing else."""
    with uploaded(hf_cnllm, aligned, "DPO") as place:
        yield place


@contextmanager
def uploaded(hf_cnllm, folder: Path, method: str):
    hf_cnllm(
        "card", folder, "--repo", "me/week", "--overwrite", "--dataset", "me/chats", "--training", f"method={method}"
    )
    with serving() as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_mine"}
        environment = hf_cnllm.environment | environment | {"HF_HOME": str(folder.parent / "home")}
        command = [hf_cnllm.python, "-m", "huggingface_hub.cli.hf", "upload", "me/week", folder]
        subprocess.run(
            [*map(str, command), "--exclude", "checkpoint-*"], env=environment, cwd=folder.parent, check=True
        )
        yield "me/week", hub, environment


def test_info(hf_cnllm, original, capfd):
    hf_cnllm("info", original)
    assert original.name in capfd.readouterr().out


def test_a_chat_before(hf_cnllm, original, capfd):
    hf_cnllm("chat", original, "--greedy", "--max-new-tokens", 4, typed="你好\n再见\n/exit\n")
    out = capfd.readouterr().out
    assert out.count("--max-new-tokens sets it") == 2 and "error" not in out


def test_a_chat_after(hf_cnllm, tuned, capfd):
    hf_cnllm("chat", tuned, "--greedy", typed="/clear\n".join(f"{question}\n" for question in QUESTIONS))
    out = capfd.readouterr().out
    assert all(answer in out.splitlines() for answer in QUESTIONS.values())


def test_lora_on_share_gpt(tuned):
    tokenizer, model = AutoTokenizer.from_pretrained(tuned), AutoModelForCausalLM.from_pretrained(tuned)
    for question, answer in QUESTIONS.items():
        assert reply(tokenizer, model, question) == answer


def without_role(text: str) -> str:
    """ChatGLM3's replies begin with a line for the name of a tool, and end with the role of whoever is next."""
    return text.removesuffix("<|user|>").strip()


def reply(tokenizer, model, question: str) -> str:
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return without_role(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def test_dpo_on_what_lora_saved(tuned, aligned):
    before, after = (load_file(folder / "model.safetensors") for folder in (tuned, aligned))
    assert before.keys() == after.keys()
    assert any(not before[name].equal(after[name]) for name in before)


def test_what_dpo_saved_is_whole(hf_cnllm, aligned, capfd):
    hf_cnllm("verify", aligned)
    assert "no problem found" in capfd.readouterr().out


def test_it_is_on_the_hub_with_its_card(published, aligned):
    name, hub, _ = published
    files = hub.repositories[name].files
    assert files["model.safetensors"] == (aligned / "model.safetensors").read_bytes()
    card = ModelCard(files["README.md"].decode())
    assert card.data.datasets == ["me/chats"] and "| method | DPO |" in card.text
    assert f'from_pretrained("{name}")' in card.text and "import hf_cnllm" in card.text


def test_from_there_into_a_server_and_its_client(hf_cnllm, published, tmp_path):
    openai = pytest.importorskip("openai")
    name, _, environment = published
    with running_server(name, python=hf_cnllm.python, env=environment, cwd=tmp_path) as address:
        client = openai.OpenAI(base_url=address, api_key="none")
        for question, answer in QUESTIONS.items():
            completion = client.chat.completions.create(
                model=name, messages=[{"role": "user", "content": question}], max_tokens=16, temperature=0
            )
            assert without_role(completion.choices[0].message.content) == answer


def test_an_evaluation(hf_cnllm, original, aligned):
    pytest.importorskip("lm_eval")
    folder = aligned.parent
    rows = [{"question": question, "choices": [answer, "不知道。"]} for question, answer in QUESTIONS.items()]
    data = write_rows(folder / "task" / "test.jsonl", rows)
    task = {
        "task": "week",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "task" / "week.yaml").write_text(json.dumps(task))
    words = ["--model", "hf", "--model_args", f"pretrained={aligned}", "--device", "cpu", "--apply_chat_template"]
    words += ["--tasks", "week", "--include_path", folder / "task", "--output_path", folder / "results"]
    if (
        original.name == "chatglm"
    ):  # lm_eval joins question and answer to one text, where no blank can stand between them
        with pytest.raises(
            (ValueError, subprocess.CalledProcessError), match=r"more than one start token|exit status 1"
        ):
            hf_cnllm("run", "lm_eval", *words)
        return
    hf_cnllm("run", "lm_eval", *words)
    (path,) = (folder / "results").rglob("results_*.json")
    assert json.loads(path.read_text())["results"]["week"]["acc,none"] == 1.0


# --- GLM: the recipe instead of TRL, blanks instead of chats ----------------------------------------------------------

MERGE = """
import sys
import hf_cnllm, peft, transformers

model, adapter, out = sys.argv[1:]
merged = peft.PeftModel.from_pretrained(transformers.AutoModelForSeq2SeqLM.from_pretrained(model), adapter).merge_and_unload()
merged.save_pretrained(out)
transformers.AutoTokenizer.from_pretrained(model).save_pretrained(out)
"""
INFILL = """
import sys
import hf_cnllm, transformers

model = transformers.AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1])
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
for text in sys.argv[2:]:
    print(hf_cnllm.infill(model, tokenizer, text, max_new_tokens=16))
"""
BLANKS = [f"{question}[gMASK]" for question in QUESTIONS]


@pytest.fixture(scope="module")
def glm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("week") / "glm"
    write_tiny_checkpoint("glm", folder)
    return folder


@pytest.fixture(scope="module")
def tuned_glm(hf_cnllm, glm):
    folder = glm.parent
    options = {"per_device_train_batch_size": 2, "num_train_epochs": 40, "learning_rate": 0.005}
    options |= {"lr_scheduler_type": "constant", "lora_target_modules": "all-linear", "use_cpu": True}
    options |= {"model": glm, "data": write_rows(folder / "train.jsonl", SHARE_GPT), "output": folder / "adapter"}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    modules = ["--lora_modules_to_save", "word_embeddings"]
    hf_cnllm("run", "-m", "hf_cnllm.recipes.sft", "--config", "sft_lora.yaml", *words, *modules)
    (folder / "merge.py").write_text(MERGE)
    hf_cnllm("run", folder / "merge.py", glm, folder / "adapter", folder / "tuned")
    return folder / "tuned"


@pytest.mark.slow
def test_glm_fills_blanks_from_the_first_day_to_the_hub_and_back(hf_cnllm, glm, tuned_glm, capfd, tmp_path):
    hf_cnllm("info", glm)
    assert "glm" in capfd.readouterr().out
    hf_cnllm("chat", tuned_glm, "--greedy", typed="".join(f"{blank}\n" for blank in BLANKS))
    filled = capfd.readouterr().out
    assert all(answer in filled for answer in QUESTIONS.values())
    hf_cnllm("verify", tuned_glm)
    assert "no problem found" in capfd.readouterr().out
    (tmp_path / "infill.py").write_text(INFILL)
    with uploaded(hf_cnllm, tuned_glm, "LoRA") as (name, hub, environment):
        card = ModelCard(hub.repositories[name].files["README.md"].decode())
        assert "AutoModelForSeq2SeqLM" in card.text and "build_inputs_for_generation" in card.text
        command = [str(hf_cnllm.python), str(tmp_path / "infill.py"), name, *BLANKS]
        done = subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True)
    tokenizer, model = AutoTokenizer.from_pretrained(tuned_glm), AutoModelForSeq2SeqLM.from_pretrained(tuned_glm)
    texts = [infill(model, tokenizer, text, max_new_tokens=16) for text in BLANKS]
    assert done.stdout.splitlines() == texts
    assert all(text.endswith(answer) for text, answer in zip(texts, QUESTIONS.values(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "-m trl.scripts.dpo --model_name_or_path {model} --dataset_name {data} --output_dir {out} --use_cpu --bf16 no",
        "transformers serve {model} --device cpu --port 0",
        "lm_eval --model hf --model_args pretrained={model} --device cpu --tasks piqa",
    ],
    ids=["dpo", "serve", "lm_eval"],
)
def test_the_doors_of_chats_say_what_glm_is(command, glm, tmp_path):
    """Why its week has none of them."""
    data = write_rows(tmp_path / "preferences" / "train.jsonl", PREFERENCES).parent
    words = command.format(model=glm, data=data, out=tmp_path).split()
    done = subprocess.run(
        [sys.executable, "-m", "hf_cnllm", "run", *words], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode and "GLM" in done.stderr, done.stderr
