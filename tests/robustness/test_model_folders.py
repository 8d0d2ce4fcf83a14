"""Damaged checkpoints: a folder loads with its own numbers, says what is wrong with it, or does not load."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from goldens import FORWARD_INPUTS, GOLDENS, cases_of
from robustness.folders import (
    DROPPED,
    MODEL_FILES,
    MODELS,
    Damage,
    change_tensors,
    copy_model,
    cuts,
    flips,
    fresh,
    link,
    overwrite,
    read_json,
    remove,
    replace,
    set_key,
    write_json,
)
from robustness.tally import sample, sample_or_whole

PART = "model folders"
every_model = pytest.mark.parametrize("golden", MODELS)
LONG_CASES = {"qwen": "long_40_ntk1_logn1"}  # beyond the trained length, where NTK and LogN act
WEIGHTS = "model.safetensors"

# What no reader can know.
FLIPPED_WEIGHT = "a flipped bit of a weight: the file has no checksum"
OTHER_WEIGHTS = "finite weights of the right names and shapes: nothing says that they are others"
ONE_OF_TWO = "one of two weights that ChatGLM-6B ties is missing: the other stands for both"
TIED = {"transformer.word_embeddings.weight", "lm_head.weight"}
# Baichuan of an unusual vocabulary size: only the tokenizer's class says that the head is a NormHead.
ONLY_MARK = {("baichuan2_13b", "tokenizer_class")}
LEGAL_VALUE = "another legal value of an option, or its default: nothing in the folder contradicts it"

# Options of a configuration whose value only the configuration knows: every legal one is believed.
OPTIONS = {
    # numbers and switches of the computation
    *("rms_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "hidden_act", "model_max_length", "seq_length"),
    *("max_position_embeddings", "max_sequence_length", "rotary_emb_base", "use_dynamic_ntk", "use_logn_attn"),
    *("apply_residual_connection_post_layernorm", "attention_scale", "z_loss_weight", "rope_ratio", "rotary_pct"),
    *("position_encoding_2d", "block_position_encoding", "rmsnorm", "layernorm_epsilon", "num_attention_heads"),
    # tokens, which the model takes from the configuration alone
    *("mask_token_id", "gmask_token_id", "bos_token_id", "eos_token_id", "pad_token_id"),
}
NEVER_A_VALUE = ("nonsense", -1, -(10**6), float("nan"), float("inf"), -float("inf"), [], {}, [1, 2], {"a": 1})
SELDOM_A_VALUE = (DROPPED, None, 0, 1, 3, 1.5, 10_000, True, False, "3", "")
NOTES = {"transformers_version", "_name_or_path", "onnx_safe"}


def forward_inputs(golden: str) -> dict[str, Any]:
    cases = cases_of(golden)
    case = cases[LONG_CASES.get(golden, next(iter(cases)))]
    return {name: value for name, value in case.inputs.items() if name in FORWARD_INPUTS}


@torch.no_grad()
def logits_of(golden: str, folder: Path, **options: Any) -> torch.Tensor:
    """The logits of the golden's first case. NaN is nothing to hide, but `generate` must not answer with tokens then."""
    model = MODELS[golden].from_pretrained(folder, dtype=torch.float32, **options).eval()
    inputs = forward_inputs(golden)
    logits = model(**inputs).logits.float()
    if not logits.isfinite().all():
        model.generate(**inputs, max_new_tokens=2, do_sample=False, pad_token_id=0)
    return logits


@cache
def true_logits(golden: str) -> torch.Tensor:
    return logits_of(golden, GOLDENS / golden)


def is_true(golden: str, logits: torch.Tensor) -> bool:
    truth = true_logits(golden)
    return logits.shape == truth.shape and bool(torch.allclose(logits, truth, atol=1e-5, rtol=0))


def sweep(tally, golden: str, tmp_path: Path, name: str, cases: list, count: int, whole: bool) -> None:
    """Judges (case, damage, why a wrong answer could not be known) on copies of a golden checkpoint."""
    tally.part, tally.name = PART, name
    source = copy_model(golden, tmp_path / "source")
    tally.undamaged(lambda: logits_of(golden, source))
    for case, damage, unknowable in sample(cases, count, whole):
        folder = fresh(source, tmp_path / "damaged")
        damage(folder)
        judge(tally, golden, case, folder, unknowable)
    tally.check()


def judge(tally, golden: str, case: str, folder: Path, unknowable: str | None = None) -> None:
    tally.judge(f"{golden}, {case}", lambda: logits_of(golden, folder), lambda x: is_true(golden, x), unknowable)


# --- bytes ------------------------------------------------------------------------------------------------------------


@sample_or_whole
@every_model
def test_cut_files(golden, whole, tally, tmp_path):
    source = copy_model(golden, tmp_path / "files")
    cases = [(case, damage, None) for file in MODEL_FILES for case, damage in cuts(source / file)]
    sweep(tally, golden, tmp_path, "cut files", cases, 8, whole)


@sample_or_whole
@every_model
def test_flipped_bits_of_headers(golden, whole, tally, tmp_path):
    source = copy_model(golden, tmp_path / "files") / WEIGHTS
    end = 8 + int.from_bytes(source.read_bytes()[:8], "little")
    cases = [(case, damage, None) for case, damage in flips(source, 200, end=end)]
    sweep(tally, golden, tmp_path, "flipped bits of a safetensors header", cases, 8, whole)


@sample_or_whole
@every_model
def test_flipped_bits_of_weights(golden, whole, tally, tmp_path):
    source = copy_model(golden, tmp_path / "files") / WEIGHTS
    start = 8 + int.from_bytes(source.read_bytes()[:8], "little")
    cases = [(case, damage, FLIPPED_WEIGHT) for case, damage in flips(source, 60, start=start)]
    sweep(tally, golden, tmp_path, "flipped bits of weights", cases, 3, whole)


@sample_or_whole
@every_model
def test_flipped_bits_of_configurations(golden, whole, tally, tmp_path):
    source = copy_model(golden, tmp_path / "files") / "config.json"
    cases = [(case, damage, _flip_unknowable(golden, damage, tmp_path)) for case, damage in flips(source, 200)]
    sweep(tally, golden, tmp_path, "flipped bits of config.json", cases, 8, whole)


def _flip_unknowable(golden: str, damage: Damage, tmp_path: Path) -> str | None:
    """A flip that renames an option drops it, one in its value gives it another."""
    folder = copy_model(golden, tmp_path / "flipped")
    before = read_json(folder / "config.json")
    damage(folder)
    try:
        after = read_json(folder / "config.json")
    except ValueError:
        return None
    changed = {key for key in before | after if before.get(key) != after.get(key) or (key in before) != (key in after)}
    known = {key for key in before if key in OPTIONS or key in NOTES or (golden, key) in ONLY_MARK}
    legal = all(key not in before or key in known for key in changed)
    return LEGAL_VALUE if legal else None


# --- configurations ---------------------------------------------------------------------------------------------------


@sample_or_whole
@every_model
def test_wrong_values_in_configurations(golden, whole, tally, tmp_path):
    """Nothing that no option takes is taken: text, containers, negative, NaN and infinite numbers."""
    cases = list(_config_cases(golden, tmp_path, NEVER_A_VALUE))
    sweep(tally, golden, tmp_path, "wrong values in config.json", cases, 12, whole)


@sample_or_whole
@every_model
def test_missing_and_odd_values_in_configurations(golden, whole, tally, tmp_path):
    cases = list(_config_cases(golden, tmp_path, SELDOM_A_VALUE))
    sweep(tally, golden, tmp_path, "missing keys and odd values in config.json", cases, 12, whole)


def _config_cases(golden: str, tmp_path: Path, values: tuple) -> Iterator[tuple]:
    config = read_json(copy_model(golden, tmp_path / "files") / "config.json")
    for key in config:
        if key in NOTES:
            continue
        for value in values:
            if value == 10_000 and "layers" in key:
                value = 99  # layers take their time to be found too many
            shown = "dropped" if value is DROPPED else f"= {value!r}"
            unknowable = LEGAL_VALUE if key in OPTIONS and values is SELDOM_A_VALUE else None
            if value in (DROPPED, None) and (golden, key) in ONLY_MARK:
                unknowable = LEGAL_VALUE
            yield f"config.json: {key} {shown}", set_key("config.json", key, value), unknowable


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b"{", b"\xff\xfe{}", b"\x00" * 64, b'"text"'])
def test_other_contents_of_config_json(content, tally, tmp_path):
    tally.part, tally.name = PART, "other contents of config.json"
    for golden in MODELS:
        folder = copy_model(golden, tmp_path / golden)
        overwrite("config.json", content)(folder)
        judge(tally, golden, repr(content), folder)
    tally.check()


# --- tensors ----------------------------------------------------------------------------------------------------------


@sample_or_whole
@every_model
def test_tensors(golden, whole, tally, tmp_path):
    """Missing, misshaped, renamed, retyped and extra tensors."""
    tensors = load_file(copy_model(golden, tmp_path / "files") / WEIGHTS)
    cases: list[tuple] = []
    for name in tensors:
        for what, change in TENSOR_DAMAGES.items():
            unknowable = None
            if what == "with its values in reverse" or (
                what in ("with NaN", "with infinity") and not tensors[name].is_floating_point()
            ):
                unknowable = OTHER_WEIGHTS
            elif what == "missing" and name in TIED and golden.startswith("chatglm_6b"):
                unknowable = ONE_OF_TWO
            cases.append(
                (f"{name} {what}", change_tensors(lambda t, name=name, change=change: change(t, name)), unknowable)
            )
    cases.append(("a tensor too many", change_tensors(lambda t: t.update(extra=torch.zeros(2))), None))
    cases.append(("no tensor", change_tensors(dict.clear), None))
    sweep(tally, golden, tmp_path, "tensors", cases, 12, whole)


def _rename(new: str):
    return lambda tensors, name: tensors.update({new.format(name=name): tensors.pop(name)})


def _change(change):
    return lambda tensors, name: tensors.update({name: change(tensors[name])})


TENSOR_DAMAGES = {
    "missing": lambda tensors, name: tensors.pop(name),
    "renamed": _rename("{name}x"),
    "with a prefix too many": _rename("model.model.{name}"),
    "a row short": _change(lambda t: t[:-1].clone()),
    "a row too long": _change(lambda t: torch.cat([t, t[:1]])),
    "with a dimension more": _change(lambda t: t[None].clone()),
    "flat": _change(lambda t: t.flatten().clone() if t.ndim > 1 else t[:, None].clone()),
    "as integers": _change(lambda t: t.to(torch.int32)),
    "as booleans": _change(lambda t: t.bool()),
    "as complex numbers": _change(lambda t: t.to(torch.complex64)),
    "with its values in reverse": _change(lambda t: t.flip(0).clone()),
    "with NaN": _change(lambda t: t.float().fill_(float("nan")) if t.is_floating_point() else t.flip(0).clone()),
    "with infinity": _change(lambda t: t.float().fill_(float("inf")) if t.is_floating_point() else t.flip(0).clone()),
}


@sample_or_whole
@every_model
def test_another_models_weights(golden, whole, tally, tmp_path):
    cases = [
        (f"the weights of {other}", replace(WEIGHTS, copy_model(other, tmp_path / "others" / other) / WEIGHTS), None)
        for other in MODELS
        if other != golden
    ]
    sweep(tally, golden, tmp_path, "another model's weights", cases, 12, whole)


@sample_or_whole
@every_model
def test_another_models_configuration(golden, whole, tally, tmp_path):
    cases = [
        (
            f"the configuration of {other}",
            replace("config.json", copy_model(other, tmp_path / "o" / other) / "config.json"),
            None,
        )
        for other in MODELS
        if other != golden
    ]
    sweep(tally, golden, tmp_path, "another model's configuration", cases, 12, whole)


# --- shards -----------------------------------------------------------------------------------------------------------

INDEX = "model.safetensors.index.json"


def shard(folder: Path, count: int = 3) -> list[str]:
    """Splits the folder's weights into shards with an index, as large checkpoints come; returns their names."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    weight_map = {name: names[at * count // len(tensors)] for at, name in enumerate(tensors)}
    for file in names:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    return names


def _sharded_cases(tmp_path: Path, golden: str) -> Iterator[tuple[str, Damage]]:
    names = shard(copy_model(golden, tmp_path / "files"))
    for name in names:
        yield f"{name} missing", remove(name)
        yield (
            f"{name} is the next one",
            replace(name, tmp_path / "files" / names[(names.index(name) + 1) % len(names)]),
        )
        yield from list(cuts(tmp_path / "files" / name))[3:6]
    yield "the index missing", remove(INDEX)
    yield "an empty index", overwrite(INDEX, b"{}")
    yield "an index of nothing", overwrite(INDEX, b'{"metadata": {}, "weight_map": {}}')
    yield from cuts(tmp_path / "files" / INDEX)
    weight_map = read_json(tmp_path / "files" / INDEX)["weight_map"]
    for at, name in enumerate(weight_map):
        if at % 5 == 0:
            others = [file for file in names if file != weight_map[name]]
            yield f"the index has {name} in {others[0]}", _index_entry(name, others[0])
            yield f"the index has no {name}", _index_entry(name, DROPPED)
            yield f"the index has {name} in a missing file", _index_entry(name, "missing.safetensors")
            yield f"the index has {name} as a number", _index_entry(name, 3)


def _index_entry(name: str, file: Any) -> Damage:
    def damage(folder: Path) -> None:
        index = read_json(folder / INDEX)
        index["weight_map"].pop(name)
        if file is not DROPPED:
            index["weight_map"][name] = file
        write_json(folder / INDEX, index)

    return damage


@sample_or_whole
@every_model
def test_shards(golden, whole, tally, tmp_path):
    def sharded_first(damage: Damage) -> Damage:
        def both(folder: Path) -> None:
            shard(folder)
            damage(folder)

        return both

    cases = [(case, sharded_first(damage), None) for case, damage in _sharded_cases(tmp_path, golden)]
    sweep(tally, golden, tmp_path, "shards and their index", cases, 8, whole)


def test_an_index_that_points_out_of_its_folder(tally, tmp_path):
    """Files of other folders are not a checkpoint's to name."""
    tally.part, tally.name = PART, "an index that points out of its folder"
    for golden in MODELS:
        elsewhere = copy_model(golden, tmp_path / golden / "elsewhere")
        change_tensors(lambda tensors: tensors.update({name: t.flip(0) for name, t in tensors.items()}))(elsewhere)
        (elsewhere / WEIGHTS).rename(elsewhere / "model-00001-of-00001.safetensors")
        for target in (
            "../elsewhere/model-00001-of-00001.safetensors",
            str(elsewhere / "model-00001-of-00001.safetensors"),
        ):
            folder = copy_model(golden, tmp_path / golden / "folder")
            (folder / WEIGHTS).rename(tmp_path / "weights")
            names = list(load_file(tmp_path / "weights"))
            write_json(folder / INDEX, {"metadata": {}, "weight_map": dict.fromkeys(names, target)})
            judge(tally, golden, target, folder)
    tally.check()


# --- links ------------------------------------------------------------------------------------------------------------


@every_model
def test_links(golden, tally, tmp_path):
    other = next(name for name in MODELS if name != golden)
    right = copy_model(golden, tmp_path / "right")
    wrong = copy_model(other, tmp_path / "wrong")
    cases = []
    for name in MODEL_FILES:
        cases += [
            (f"{name} links to the right file elsewhere", link(name, right / name), None),
            (f"{name} links to another model's", link(name, wrong / name), None),
            (f"{name} links to nothing", link(name, tmp_path / "nothing"), None),
            (f"{name} links to a folder", link(name, right), None),
            (f"{name} links to itself", link(name, Path(name)), None),
            (f"{name} links to /dev/null", link(name, Path("/dev/null")), None),
        ]
    sweep(tally, golden, tmp_path, "links", cases, 20, True)
