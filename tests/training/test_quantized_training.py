"""Adapters on quantized weights through the SFT recipe: quantized as they are loaded, or before, and ChatGLM's own INT8 and INT4."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import PeftModel
from transformers.quantizers import AutoHfQuantizer
from trl import ModelConfig

from hf_cnllm import cli
from hf_cnllm.recipes import ppo, rejection_sampling, sft
from hf_cnllm.training.recipe import run_recipe
from sft_models import CHATS, ROWS, loaded, write_checkpoint

# name: package, options of the recipe, options of `hf-cnllm quantize` before it
METHODS = {
    "bitsandbytes 4 bits": ("bitsandbytes", "--load_in_4bit", None),
    "bitsandbytes 4 bits, nested": ("bitsandbytes", "--config sft_qlora.yaml", None),
    "bitsandbytes 8 bits": ("bitsandbytes", "--load_in_8bit", None),
    "bitsandbytes 4 bits, saved": ("bitsandbytes", "", "--method bitsandbytes --bits 4"),
    "torchao 8 bits, saved": ("torchao", "", "--method torchao --bits 8"),
    "ChatGLM 8 bits, saved": (None, "", "--method chatglm --bits 8"),
    "ChatGLM 4 bits, saved": (None, "", "--method chatglm --bits 4"),
}
WITH_CHATGLM_LAYERS = ("chatglm", "chatglm2", "chatglm3")
OURS = [row for row in ROWS if row not in ("llama", "bloom")]
CASES = [
    pytest.param(method, row, marks=[] if (method, row) in DEFAULT else [pytest.mark.slow], id=f"{method}-{row}")
    for DEFAULT in [[("ChatGLM 4 bits, saved", "chatglm"), ("bitsandbytes 4 bits", "baichuan alibi")]]
    for method in METHODS
    for row in OURS
    if not method.startswith("ChatGLM") or row in WITH_CHATGLM_LAYERS
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("quantized")

    def write(row, quantize=None):
        name, changes, template = ROWS[row]
        floats = root / row.replace(" ", "-")
        if not floats.exists():
            for part in loaded(write_checkpoint(name, root / f"{name}-original"), changes, template):
                part.save_pretrained(floats)
        if quantize is None:
            return floats
        folder = root / "-".join([row, *quantize.split()]).replace(" ", "-")
        if not folder.exists():
            assert cli.main(["quantize", str(floats), str(folder), *quantize.split()]) == 0
        return folder

    return write


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("\n".join(json.dumps({"messages": chat}) for chat in CHATS))
    return path


def set_words(monkeypatch, folder, data, output, *options):
    common = "--use_cpu --report_to none --logging_steps 1 --disable_tqdm true --max_length 96 --max_steps 3"
    words = [*common.split(), "--learning_rate", "1e-2", "--per_device_train_batch_size", "6", *options]
    monkeypatch.setattr(
        sys, "argv", ["sft", *map(str, ["--model", folder, "--data", data, "--output", output, *words])]
    )


@pytest.mark.parametrize(("method", "row"), CASES)
def test_an_adapter_learns_on_quantized_weights(method, row, checkpoint, data, tmp_path, monkeypatch):
    package, options, quantize = METHODS[method]
    if package is not None:
        pytest.importorskip(package)
    folder, output = checkpoint(row, quantize), tmp_path / "out"
    set_words(monkeypatch, folder, data, output, "--use_peft", *options.split())
    sft.main()
    summary = json.loads((output / "summary.json").read_text())
    assert summary["last_loss"] < summary["first_loss"]

    kind = transformers.AutoModelForSeq2SeqLM if row == "glm" else transformers.AutoModelForCausalLM
    # What was saved is the adapter: it fits the checkpoint it was trained on. (bitsandbytes' kernels for a CPU out of training
    # know no widths like these.)
    base = kind.from_pretrained(folder).train()
    ids = [9, 8, 7, 6]
    if row in ("chatglm", "glm"):
        marks = ("gmask_token_id", "sop_token_id" if row == "glm" else "bos_token_id")
        ids[2:2] = [getattr(base.config, name) for name in marks]
    with torch.no_grad():
        before = base(input_ids=torch.tensor([ids])).logits
        after = PeftModel.from_pretrained(base, output).train()(input_ids=torch.tensor([ids])).logits
    assert (after - before).abs().max() > 1e-3 and torch.isfinite(after).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "the weights of a quantized model cannot be trained: add --use_peft for an adapter"),
        (["--use_peft", "--load_in_4bit"], "quantiz"),
    ],
)
def test_what_cannot_be_trained_is_one_line(options, said, checkpoint, data, tmp_path, monkeypatch, capsys):
    folder = checkpoint("chatglm", "--method chatglm --bits 4")
    set_words(monkeypatch, folder, data, tmp_path / "out", *options)
    with pytest.raises(SystemExit) as stopped:
        run_recipe(sft.main)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sft: error: ")]
    assert stopped.value.code == 2 and said in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bits", ["--load_in_8bit", "--load_in_4bit"])
@pytest.mark.parametrize("recipe", [sft, ppo, rejection_sampling], ids=["sft", "ppo", "rejection_sampling"])
def test_weights_to_be_quantized_need_an_adapter(recipe, bits, checkpoint, data, tmp_path, monkeypatch):
    """PPO did not ask for one, and rejection sampling only when it came to learning."""
    folder = checkpoint("baichuan alibi")
    words = f"recipe --model {folder} --data {data} --output {tmp_path / 'out'} --use_cpu --report_to none {bits}"
    monkeypatch.setattr(sys, "argv", words.split() + ["--reward", "length"] * (recipe is not sft))
    with pytest.raises(ValueError, match="cannot be trained: add --use_peft"):
        recipe.main()
    assert not (tmp_path / "out").exists()


def test_weights_that_give_no_gradient_are_refused():
    """By construction: torchao's 4 bits want a GPU."""
    torchao = pytest.importorskip("torchao.quantization")
    quantizer = AutoHfQuantizer.from_config(transformers.TorchAoConfig(torchao.Int4WeightOnlyConfig()))
    with pytest.raises(ValueError, match=r"nothing can be trained through these quantized weights \(torchao\)"):
        sft.with_adapter(SimpleNamespace(hf_quantizer=quantizer), None, ModelConfig(use_peft=True))
