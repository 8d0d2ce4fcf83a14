"""The demo, shortened: few steps and short replies, but every stage and every family."""

import json
import re
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_cnllm
from hf_cnllm.cli import USER_ERROR, main
from hf_cnllm.data.conversations import load_instructions
from hf_cnllm.data.formats import ConversationError
from hf_cnllm.demo import pipeline, tasks
from hf_cnllm.demo.dataset import signed_off, split_data, without_sign_off
from hf_cnllm.demo.tasks import load_task
from hf_cnllm.demo.tiny_checkpoints import LINE_OF, TINY_FAMILIES, TINY_VARIANTS, write_tiny_checkpoint


@pytest.fixture(scope="module")
def short():
    """Four questions, replies of eight tokens, a tenth of the data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "MAX_NEW_TOKENS", 8)
        patch.setattr(pipeline, "REPLIES", 4)
        patch.setattr(pipeline, "split_data", lambda path, seed: _tenth(split_data(path, seed), path))
        yield


def _tenth(split, path):
    if path is not None:
        return split
    shortened = {
        use: getattr(split, use)[: len(getattr(split, use)) // 10] for use in ("train", "adapter", "transfer")
    }
    return split._replace(**shortened)


def run(family, output, *options):
    return main(["demo", "--family", family, "--output", str(output), "--epochs", "2", *options])


@pytest.fixture(scope="module")
def output_and_text(short, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "baichuan"
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with redirect_stdout(StringIO()) as text:
        assert run("baichuan", folder) == 0
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    return folder, text.getvalue()


@pytest.fixture(scope="module")
def output(output_and_text):
    return output_and_text[0]


def test_it_says_early_how_long_it_takes(output_and_text):
    before_training, _ = output_and_text[1].split("[3/8]")
    assert "the rest takes at most about 1 min" in before_training


def test_tiny_models_run_on_one_thread():
    with pipeline.one_thread():
        assert torch.get_num_threads() == 1


def test_everything_is_in_the_output_folder(output):
    assert {path.name for path in output.iterdir()} == {
        *("checkpoint", "finetuned", "adapter", "merged", "loss.png", "README.md", "summary.json")
    }
    assert [path.name for path in output.parent.iterdir()] == [output.name]  # nothing is left beside it
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_summary_holds_what_was_measured(output):
    summary = json.loads((output / "summary.json").read_text())
    assert summary["passed"] and len(summary["checks"]) == 3 and all(summary["checks"].values())
    assert summary["losses"]["after full fine-tuning"]["train"] < summary["losses"]["before training"]["train"]
    assert summary["losses"]["with the adapter"]["adapter"] < summary["losses"]["after full fine-tuning"]["adapter"]
    assert 0 < summary["merge_difference"] < pipeline.MERGE_TOLERANCE
    assert set(summary["samples"][0]["replies"]) == {"before training", "after full fine-tuning", "with the adapter"}


def test_the_checkpoint_is_laid_out_as_on_the_hub(output):
    config = json.loads((output / "checkpoint" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_baichuan.BaichuanForCausalLM"
    assert "position_embedding" not in config and "norm_head" not in config
    model = AutoModelForCausalLM.from_pretrained(output / "checkpoint")
    assert (model.config.position_embedding, model.config.norm_head) == ("alibi", True)
    tokenizer = AutoTokenizer.from_pretrained(output / "checkpoint")
    assert tokenizer.convert_ids_to_tokens([195, 196]) == ["<reserved_106>", "<reserved_107>"]
    assert len(tokenizer) == model.config.vocab_size


def test_the_result_generates_with_a_cache_and_max_z_stays_on(output):
    model = AutoModelForCausalLM.from_pretrained(output / "finetuned")
    assert model.config.use_cache and model.config.z_loss_weight == pytest.approx(2e-4)


def test_an_existing_folder_is_kept_or_replaced_on_request(output, short, tmp_path, capsys):
    marker = output / "marker"
    marker.touch()
    assert run("baichuan", output) == USER_ERROR and marker.exists()
    assert "is not empty; choose another folder or add --overwrite" in capsys.readouterr().err
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").touch()
    assert run("baichuan", foreign, "--overwrite") == USER_ERROR and (foreign / "thesis.txt").exists()
    assert "no earlier run wrote it" in capsys.readouterr().err


@pytest.mark.slow
def test_overwrite_replaces_an_earlier_run(short, tmp_path):
    assert run("baichuan", tmp_path / "out") == 0
    (tmp_path / "out" / "marker").touch()
    assert run("baichuan", tmp_path / "out", "--overwrite") == 0 and not (tmp_path / "out" / "marker").exists()


@pytest.mark.parametrize(
    "family",
    [
        *(
            pytest.param(family, marks=pytest.mark.slow)
            for family in sorted({*TINY_FAMILIES, *TINY_VARIANTS} - {"baichuan", "glm_roberta"})
        ),
        "glm_roberta",
    ],
)
def test_every_family(family, short, tmp_path):
    assert run(family, tmp_path / "out") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["losses"]["after full fine-tuning"]["train"] < summary["losses"]["before training"]["train"]


@pytest.mark.parametrize("family", sorted(TINY_FAMILIES))
def test_rows_that_pad_the_embedding_have_no_text(family, tmp_path):
    write_tiny_checkpoint(family, tmp_path / "checkpoint")
    task = load_task(tmp_path / "checkpoint", max_length=64)
    word = task.tokenizer("天空", add_special_tokens=False)["input_ids"]
    last = task.model.get_input_embeddings().num_embeddings - 1
    padding = [last] if last >= len(task.tokenizer) else []
    assert task.texts([word + padding, word]) == ["天空", "天空"]


def test_the_table_of_families_names_every_tiny_checkpoint():
    assert set(LINE_OF) == set(TINY_FAMILIES)


TOKENS = {
    "baichuan": 2400,
    "qwen": 2408,
    "chatglm": 2088,
    "chatglm2": 2205,
    "chatglm3": 2209,
    "glm": 2010,
    "glm130b": 1708,
}


@pytest.mark.parametrize("family", sorted(TINY_FAMILIES))
def test_the_ids_in_the_json_files_are_those_of_the_vocabulary(family, tmp_path):
    """They were written for vocabularies of these sizes, whatever becomes of the texts."""
    write_tiny_checkpoint(family, tmp_path / "checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "checkpoint")
    assert len(tokenizer) == TOKENS[family]
    for name in ("config.json", "generation_config.json"):
        path = tmp_path / "checkpoint" / name
        written = json.loads(path.read_text()) if path.exists() else {}
        for token in ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id", "gmask_token_id"):
            assert written.get(token) in (None, getattr(tokenizer, token, None)), token


@pytest.mark.parametrize("family", TINY_VARIANTS)
def test_english_checkpoints_of_glm_fill_blanks_and_learn(family, tmp_path):
    write_tiny_checkpoint(family, tmp_path / "checkpoint")
    task = load_task(tmp_path / "checkpoint", max_length=64)
    assert len(task.tokenizer) == {"glm_gpt2": 2008}.get(family, 2002)
    spelled = {"glm_gpt2": "[MASK], [sMASK] or [gMASK]", "glm_roberta": "<mask>"}.get(family, "[MASK]")
    with pytest.raises(ValueError, match=re.escape(f"to be filled by {spelled}") + "$"):
        hf_cnllm.infill(task.model, task.tokenizer, "nothing to fill")
    text = hf_cnllm.infill(
        task.model, task.tokenizer, f"The Arc {task.tokenizer.mask_token} stands in Milan.", max_new_tokens=2
    )
    assert text.lower().startswith("the arc") and text.lower().endswith("stands in milan.")
    conversation = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    loss = task.model(**task.collate([task.example(conversation)])).loss
    loss.backward()
    assert loss.isfinite() and task.model.get_input_embeddings().weight.grad.abs().sum() > 0


@pytest.mark.parametrize("family", sorted({*TINY_FAMILIES, *TINY_VARIANTS}))
def test_the_same_seed_writes_the_same_checkpoint(family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        write_tiny_checkpoint(family, name, seed=3)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


# ---- one's own checkpoint and data


def write_data(path, conversations):
    path.write_text("\n".join(json.dumps({"messages": c}) for c in conversations))
    return path


def test_ones_own_checkpoint_and_data(output, short, tmp_path):
    data = write_data(tmp_path / "data.jsonl", load_instructions()[:10])
    options = ["--model", str(output / "finetuned"), "--data", str(data), "--output", str(tmp_path / "out")]
    assert main(["demo", *options, "--epochs", "1", "--learning-rate", "1e-3"]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["conversations"] == {"train": 8, "held_out": 1, "adapter": 1} and summary["signed_off"] == {}
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_a_failed_run_leaves_nothing(output, tmp_path, capsys):
    data = write_data(tmp_path / "data.jsonl", load_instructions()[:10])
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    code = main(["demo", "--model", str(tmp_path / "model"), "--data", str(data), "--output", str(tmp_path / "out")])
    assert code == USER_ERROR and "served by transformers itself" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "model"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "x"], "--data FILE.jsonl is missing"),
        (["--data", "x"], "--model PATH is missing"),
        (["--epochs", "0"], "--epochs must be positive"),
        (["--model", "x", "--data", "no-such-file.jsonl"], "no-such-file.jsonl"),
    ],
)
def test_bad_options_are_one_line(options, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *options]) == USER_ERROR
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_too_little_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 8 are needed"):
        split_data(write_data(tmp_path / "data.jsonl", load_instructions()[:3]), seed=0)


def test_a_missing_extra_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run("baichuan", tmp_path / "out") == USER_ERROR
    assert 'pip install "hf-cnllm[train]"' in capsys.readouterr().err


# ---- the data


def test_no_conversation_is_used_twice_where_it_must_not_be():
    split = split_data(None, seed=0)
    train, held_out = ({str(c) for c in use} for use in (split.train, split.held_out))
    adapter = {str([{**m, "content": without_sign_off(m["content"])} for m in c]) for c in split.adapter}
    assert not train & held_out and adapter < train and not adapter & {str(c) for c in split.transfer}


def test_sign_offs_follow_the_question():
    chat = [
        {"role": r, "content": c}
        for r, c in (("user", "你好"), ("assistant", "hi"), ("user", "Hi"), ("assistant", "啊"))
    ]
    assert [m["content"] for m in signed_off(chat)] == ["你好", "hi希望对你有帮助。", "Hi", "啊 Hope this helps!"]
    assert [without_sign_off(m["content"]) for m in signed_off(chat)] == [m["content"] for m in chat]


def test_logits_of_finetuned_and_merged_differ(output):
    ids = torch.tensor([[195, 700, 800, 196]])
    with torch.no_grad():
        one, two = (
            AutoModelForCausalLM.from_pretrained(output / name)(ids).logits for name in ("finetuned", "merged")
        )
    assert not torch.allclose(one, two)


def test_a_long_question_to_glm_keeps_its_blank_and_the_answer(tmp_path):
    write_tiny_checkpoint("glm", tmp_path / "glm")
    task = load_task(tmp_path / "glm", max_length=64)
    question, answer = {"role": "user", "content": "天地玄黄" * 400}, {"role": "assistant", "content": "因为散射。"}
    batch = task.collate([task.example([question, answer])])
    blank = task.tokenizer.convert_tokens_to_ids(task.blank)
    learned = [label for label in batch["labels"].flatten().tolist() if label != -100]
    expected = task.tokenizer(answer["content"], add_special_tokens=False)["input_ids"]
    assert (
        learned == [*expected, task.tokenizer.eop_token_id] and batch["input_ids"].flatten().tolist().count(blank) == 1
    )
    with pytest.raises(ConversationError, match="nothing of a conversation would be learned"):
        task.example([question, answer | {"loss": False}])


def test_data_with_tools_is_refused_by_the_demo(tmp_path):
    row = {"messages": load_instructions()[0], "tools": [{"name": "f"}]}
    (tmp_path / "data.jsonl").write_text("\n".join([json.dumps(row)] * 9))
    with pytest.raises(ConversationError, match="the demo has no tools to call"):
        split_data(tmp_path / "data.jsonl", seed=0)
