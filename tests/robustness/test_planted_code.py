"""Code in a checkpoint's folder: none of it runs, whatever the caller passes.

Every planted file leaves a mark when it runs. A folder that is read without its mark is right if its numbers are, too.
"""

import base64
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoTokenizer, GenerationConfig, pipeline

import hf_cnllm
from goldens import GOLDENS
from robustness.folders import MODELS, copy_model, fresh, read_json, write_json
from robustness.test_model_folders import forward_inputs, is_true
from robustness.test_tokenizer_folders import MODEL_OF, VOCABULARIES, answers, truth
from tokenizer_goldens import FIXTURES

PART = "planted code"
TRUST = (None, False, True)
Plant = Callable[[Path, str], None]  # into a folder, code that runs


@pytest.fixture
def mark(tmp_path) -> Path:
    """The file that planted code makes."""
    return tmp_path / "it-ran"


def code_for(mark: Path) -> str:
    return f"open({str(mark)!r}, 'w').close()\n"


class _Runs:
    """Pickled, it makes a file when it is read."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


# --- models -----------------------------------------------------------------------------------------------------------

CLASSES = """
from transformers import PreTrainedConfig, PreTrainedModel
class Config(PreTrainedConfig):
    model_type = "planted"
class Model(PreTrainedModel):
    config_class = Config
    def __init__(self, config):
        super().__init__(config)
"""
AUTO_CLASSES = (
    *("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoTokenizer", "AutoProcessor"),
    "AutoModelForSequenceClassification",
)


def _auto_map(folder: Path, code: str) -> None:
    config = read_json(folder / "config.json")
    config["auto_map"] = {name: "planted.Config" if name == "AutoConfig" else "planted.Model" for name in AUTO_CLASSES}
    write_json(folder / "config.json", config)
    (folder / "planted.py").write_text(code + CLASSES)
    for name in ("configuration_baichuan", "modeling_baichuan", "modeling_chatglm", "modeling_qwen", "modeling_glm"):
        (folder / f"{name}.py").write_text(code + CLASSES)


def _custom_generate(folder: Path, code: str) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(
        f"{code}\ndef generate(model, *args, **kwargs):\n    {code}    return 'planted'\n"
    )
    (folder / "custom_generate" / "requirements.txt").write_text("")


def _pickle_beside(folder: Path, code: str) -> None:
    (folder / "pytorch_model.bin").write_bytes(_payload(code))
    (folder / "optimizer.pt").write_bytes(_payload(code))
    (folder / "training_args.bin").write_bytes(_payload(code))


def _pickle_instead(folder: Path, code: str) -> None:
    (folder / "model.safetensors").unlink()
    _pickle_beside(folder, code)


def _pickle_named_safetensors(folder: Path, code: str) -> None:
    (folder / "model.safetensors").write_bytes(_payload(code))


def _torch_zip(folder: Path, code: str) -> None:
    tensors = dict(load_file(folder / "model.safetensors"))
    tensors["planted"] = _Runs(Path(code.split("'")[1]))
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _payload(code: str) -> bytes:
    return pickle.dumps(_Runs(Path(code.split("'")[1])))


def _config_key(**keys: Any) -> Plant:
    def plant(folder: Path, code: str) -> None:
        (folder / "planted.py").write_text(code + CLASSES)
        write_json(folder / "config.json", read_json(folder / "config.json") | keys)

    return plant


def _generation_config(**keys: Any) -> Plant:
    def plant(folder: Path, code: str) -> None:
        _custom_generate(folder, code)
        write_json(folder / "generation_config.json", {"max_new_tokens": 2, **keys})

    return plant


def _python_files(folder: Path, code: str) -> None:
    for name in ("__init__", "setup", "conftest", "torch", "transformers", "hf_cnllm", "sitecustomize", "handler"):
        (folder / f"{name}.py").write_text(code)


MODEL_PLANTS: dict[str, Plant] = {
    "auto_map of every class": _auto_map,
    "custom_generate/generate.py": _custom_generate,
    "auto_map and custom_generate": lambda folder, code: [_auto_map(folder, code), _custom_generate(folder, code)],
    "a pickle beside the weights": _pickle_beside,
    "a pickle for the weights": _pickle_instead,
    "a pickle named safetensors": _pickle_named_safetensors,
    "a pickle in torch's zip": _torch_zip,
    "a kernel for attention": _config_key(_attn_implementation="planted/kernel", attn_implementation="planted/kernel"),
    "a kernel from the folder": _config_key(attn_implementation="./planted"),
    "custom pipelines": _config_key(
        custom_pipelines={"text-generation": {"impl": "planted.Model", "pt": ["AutoModel"]}}
    ),
    "a quantization of its own": _config_key(quantization_config={"quant_method": "planted", "modules": "planted.py"}),
    "names of modules": _config_key(tokenizer_class="planted.Model", architectures=["planted.Model"]),
    "another model type and auto_map": lambda folder, code: [
        _auto_map(folder, code),
        _config_key(model_type="planted")(folder, code),
    ],
    "a generation config that names code": _generation_config(custom_generate="custom_generate"),
    "a generation config that trusts": _generation_config(trust_remote_code=True),
    "python files": _python_files,
}


def use_model(golden: str, folder: Path, options: dict[str, Any]) -> torch.Tensor:
    """Loads, computes and generates; the logits."""
    config = AutoConfig.from_pretrained(folder, **options)
    assert type(config).__module__.startswith(("hf_cnllm.", "transformers.")), type(config)
    model = MODELS[golden].from_pretrained(folder, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        logits = model(**forward_inputs(golden)).logits.float()
        output = model.generate(**forward_inputs(golden), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert isinstance(output, torch.Tensor), output
    return logits


def unless_it_ran(mark: Path, result: Callable[[], Any]) -> Any:
    """The result, or its error; whatever it is, `RAN` if the mark is there or a kernel of the Hub was asked for."""
    try:
        value = result()
    except Exception as error:
        if mark.exists() or (isinstance(error, ImportError) and "`kernels` is either not installed" in str(error)):
            return RAN
        raise
    return RAN if mark.exists() else value


RAN = "the code ran"


@pytest.mark.parametrize("golden", MODELS)
def test_models(golden, tally, tmp_path, mark):
    tally.part, tally.name = PART, "models"
    source = copy_model(golden, tmp_path / "source")
    for name, plant in MODEL_PLANTS.items():
        for trust in TRUST:
            folder = fresh(source, tmp_path / f"planted-{trust}")
            plant(folder, code_for(mark))
            tally.judge(
                f"{golden}, {name}, trust_remote_code={trust}",
                lambda folder=folder, trust=trust: unless_it_ran(
                    mark, lambda: use_model(golden, folder, {} if trust is None else {"trust_remote_code": trust})
                ),
                lambda found: found is not RAN and is_true(golden, found),
                TRANSFORMERS_OWN.get(name) if trust else None,
            )
            mark.unlink(missing_ok=True)
    tally.check()


# What transformers itself does before anything of this package is asked.
TRUSTED = (
    "auto_map alone, without a class name or config.json: nothing names this package, and the caller trusts the folder"
)
TRANSFORMERS_OWN = {
    "another model type and auto_map": "a model_type that this package does not know is not its checkpoint: "
    "transformers runs its code if the caller trusts it",
}


def test_classes_of_this_package(tally, tmp_path, mark):
    """The classes by their own names, not the auto classes."""
    tally.part, tally.name = PART, "models by their class"
    classes = {
        "baichuan_7b": hf_cnllm.BaichuanForCausalLM,
        "chatglm2_6b": hf_cnllm.ChatGLMForConditionalGeneration,
        "chatglm_6b_3layer": hf_cnllm.ChatGLMForConditionalGeneration,
        "glm": hf_cnllm.GLMForConditionalGeneration,
        "glm130b": hf_cnllm.GLM130BForConditionalGeneration,
        "qwen": hf_cnllm.QWenLMHeadModel,
    }
    for golden, model_class in classes.items():
        source = copy_model(golden, tmp_path / golden)
        for name in (
            "auto_map and custom_generate",
            "a pickle for the weights",
            "a generation config that names code",
        ):
            for trust in TRUST:
                folder = fresh(source, tmp_path / "planted")
                MODEL_PLANTS[name](folder, code_for(mark))
                options = {} if trust is None else {"trust_remote_code": trust}

                def use(folder=folder, options=options, golden=golden, model_class=model_class):
                    model = model_class.from_pretrained(folder, **options).eval()
                    inputs = forward_inputs(golden)
                    model.generate(**inputs, max_new_tokens=2, do_sample=False, pad_token_id=0, **options)
                    return model(**inputs).logits.float()

                tally.judge(
                    f"{golden}, {name}, trust_remote_code={trust}",
                    lambda use=use: unless_it_ran(mark, use),
                    lambda found, golden=golden: found is not RAN and is_true(golden, found),
                )
                mark.unlink(missing_ok=True)
    tally.check()


# --- tokenizers -------------------------------------------------------------------------------------------------------

TOKENIZER = """
from transformers import PreTrainedTokenizer
class Tokenizer(PreTrainedTokenizer):
    def __init__(self, *args, **kwargs):
        super().__init__(**kwargs)
"""
ATTACKING_TEMPLATES = (
    "{{ messages[0]['content'] }}",  # the one that attacks nothing
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "{{ lipsum.__globals__['os'].popen('touch MARK').read() }}",
    "{{ self.__init__.__globals__.__builtins__.open('MARK', 'w') }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__['os'].system('touch MARK') }}",
    "{{ tojson.__globals__ }}",
    "{{ strftime_now.__globals__['os'].system('touch MARK') }}",
    "{% set x = namespace(a=messages.append('x')) %}{{ messages }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch MARK') }}",
    "{% from 'os' import system %}{{ system('touch MARK') }}",
    "{{ (messages|attr('__class__')).__mro__ }}",
    "{{ '%s'.__mod__.__self__.__class__.mro() }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ range(10**9)|list }}",
    "{{ get_flashed_messages.__globals__ }}",
)


def _tokenizer_auto_map(folder: Path, code: str, class_name: str | None = None) -> None:
    config = read_json(folder / "tokenizer_config.json")
    config["auto_map"] = {"AutoTokenizer": ["planted.Tokenizer", "planted.Tokenizer"]}
    if class_name is not None:
        config["tokenizer_class"] = class_name
    write_json(folder / "tokenizer_config.json", config)
    (folder / "planted.py").write_text(code + TOKENIZER)


def _auto_map_alone(folder: Path, code: str) -> None:
    _tokenizer_auto_map(folder, code)
    config = read_json(folder / "tokenizer_config.json")
    del config["tokenizer_class"]
    write_json(folder / "tokenizer_config.json", config)


def _pickled_tokenizer(folder: Path, code: str) -> None:
    for name in ("tokenizer.pkl", "added_tokens.pkl", "tokenizer.bin", "chat_template.pkl"):
        (folder / name).write_bytes(_payload(code))
    config = read_json(folder / "tokenizer_config.json")
    config["tokenizer_object"] = base64.b64encode(_payload(code)).decode()
    write_json(folder / "tokenizer_config.json", config)


TOKENIZER_PLANTS: dict[str, Plant] = {
    "auto_map": _tokenizer_auto_map,
    "auto_map alone": _auto_map_alone,
    "auto_map and a class of its own": lambda folder, code: _tokenizer_auto_map(folder, code, "Tokenizer"),
    "auto_map and a class of no name": lambda folder, code: _tokenizer_auto_map(folder, code, ""),
    "auto_map and a fast class": lambda folder, code: _tokenizer_auto_map(folder, code, "TokenizerFast"),
    "pickles": _pickled_tokenizer,
    "python files": _python_files,
}
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"trust_remote_code": True},
    {"trust_remote_code": False},
    {"trust_remote_code": True, "use_fast": False},
)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_tokenizers(name, tally, tmp_path, mark):
    tally.part, tally.name = PART, "tokenizers"
    for plant_name, plant in TOKENIZER_PLANTS.items():
        for with_config in (False, True):
            for options in OPTIONS:
                folder = fresh(FIXTURES / "vocab" / name, tmp_path / "planted")
                if with_config:
                    shutil.copy(GOLDENS / MODEL_OF[name] / "config.json", folder)
                plant(folder, code_for(mark))
                tally.judge(
                    f"{name}, {plant_name}, config.json={with_config}, {options}",
                    lambda folder=folder, options=options: unless_it_ran(mark, lambda: answers(folder, **options)),
                    lambda found: found == truth(name),
                    TRUSTED
                    if plant_name == "auto_map alone" and not with_config and "trust_remote_code" in options
                    else None,
                )
                mark.unlink(missing_ok=True)
    tally.check()


@pytest.mark.parametrize(
    "name", ["baichuan2_small", "chatglm1_small", "chatglm2_small", "chatglm3_small", "qwen_small"]
)
def test_chat_templates(name, tally, tmp_path, mark):
    """Templates of a checkpoint are rendered in a sandbox: they leave no mark, show no insides, change no message."""
    tally.part, tally.name = PART, "chat templates"
    for where in ("chat_template.jinja", "tokenizer_config.json", "argument"):
        for template in ATTACKING_TEMPLATES:
            text = template.replace("MARK", str(mark))
            folder = fresh(FIXTURES / "vocab" / name, tmp_path / "planted")
            _put_template(folder, where, text)
            messages = [{"role": "user", "content": "hi"}]

            def render(folder=folder, text=text, where=where, messages=messages):
                tokenizer = AutoTokenizer.from_pretrained(folder)
                options = {"chat_template": text} if where == "argument" else {}
                shown = tokenizer.apply_chat_template(messages, tokenize=False, **options)
                return shown, tokenizer.apply_chat_template(messages, return_dict=False, **options)

            tally.judge(
                f"{name}, {where}: {template}",
                lambda render=render: unless_it_ran(mark, render),
                lambda found, messages=messages: (
                    found is not RAN
                    and not any(word in found[0] for word in ("<class", "root:", "__builtins__", "built-in"))
                    and messages == [{"role": "user", "content": "hi"}]
                ),
            )
            mark.unlink(missing_ok=True)
    tally.check()


def _put_template(folder: Path, where: str, text: str) -> None:
    if where == "chat_template.jinja":
        (folder / where).write_text(text)
    elif where == "tokenizer_config.json":
        write_json(folder / where, read_json(folder / where) | {"chat_template": text})


# --- what else loads a folder ---------------------------------------------------------------------------------------------


def test_other_loaders(tally, tmp_path, mark):
    """pipeline, GenerationConfig, adapters: with the caller's trust, and without."""
    tally.part, tally.name = PART, "pipelines, generation configs, adapters"
    for trust in TRUST:
        folder = copy_model("qwen", tmp_path / f"model-{trust}")
        shutil.copytree(FIXTURES / "vocab" / "qwen_small", folder, dirs_exist_ok=True)
        config = read_json(folder / "config.json") | {"vocab_size": 2300}
        write_json(folder / "config.json", config)
        (folder / "model.safetensors").unlink()
        AutoModel.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
        for plant in MODEL_PLANTS:
            if plant in ("auto_map and custom_generate", "custom pipelines", "python files"):
                planted = fresh(folder, tmp_path / "planted")
                MODEL_PLANTS[plant](planted, code_for(mark))
                _tokenizer_auto_map(planted, code_for(mark))
                for what, use in _loaders(planted, {} if trust is None else {"trust_remote_code": trust}):
                    tally.judge(
                        f"{what}, {plant}, trust_remote_code={trust}",
                        lambda use=use: unless_it_ran(mark, use),
                        lambda found: found is not RAN,
                    )
                    mark.unlink(missing_ok=True)
    tally.check()


def _loaders(folder: Path, options: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    yield "pipeline", lambda: pipeline("text-generation", str(folder), **options)("hi", max_new_tokens=1)
    yield "GenerationConfig", lambda: GenerationConfig.from_pretrained(folder, **options)
    yield "AutoConfig", lambda: AutoConfig.from_pretrained(folder, **options)
