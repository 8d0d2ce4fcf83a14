"""What hf_cnllm relies on in transformers, tried out: a release that breaks it ends in an error, never in a wrong token.

transformers promises nothing about the insides that `_compat` touches, and a renamed keyword can vanish in somebody's
`**kwargs` without an error. So when the installed release is newer than the newest tested, the first model or tokenizer
that is made runs [`broken_promises`]: signatures, and the real functions on tensors of a few numbers, `generate`
included. It takes a few hundredths of a second. The same check is a test, and part of `hf-cnllm doctor`.
"""

import contextlib
import functools
import inspect
import tempfile
import warnings
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    AutoTokenizer,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ._compat import CACHE, CACHE_NAMES, LateEncodings, PushToHubMixin, logging, modeling, options_of_tokenizer
from .models.validation import take_cache


def broken_promises() -> list[str]:
    """What does not hold, a phrase each; empty if all is as it should be. Leaves no trace, the random state included."""
    with _undisturbed():
        return [broken for promise in PROMISES for broken in _outcome(promise)]


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """A model may be built on the meta device, in half precision, or inside of anything else: not so the check."""
    level, dtype = logging.get_verbosity(), torch.get_default_dtype()
    logging.set_verbosity_error()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(dtype)
        logging.set_verbosity(level)


def _outcome(promise: Callable[[], Iterator[str]]) -> list[str]:
    try:
        return list(promise())
    except Exception as error:
        name = promise.__name__.removeprefix("_").replace("_", " ")
        return [f"{name}: {type(error).__name__}: {' '.join(str(error).split())}"]


# --- signatures -------------------------------------------------------------------------------------------------------

# Class, method, its leading parameters (those that go by position, and by keyword), and perhaps who has to call it: what
# is overridden here does nothing once nobody calls it any more. Whom `generate` calls is seen below.
METHODS: tuple[tuple[Any, ...], ...] = (
    (GenerationMixin, "_prepare_position_ids_for_generation", "inputs_tensor model_kwargs"),
    (GenerationMixin, "_expand_inputs_for_generation", "expand_size is_encoder_decoder input_ids"),
    (GenerationMixin, "_prefill", "input_ids generation_config model_kwargs"),
    (GenerationMixin, "_prepare_cache_for_generation", "generation_config model_kwargs generation_mode"),
    (GenerationMixin, "_prepare_static_cache", "cache_implementation batch_size max_cache_len"),
    (GenerationMixin, "prepare_inputs_for_generation", "input_ids next_sequence_length"),
    (GenerationMixin, "generate", "inputs generation_config logits_processor"),
    (
        GenerationMixin,
        "load_custom_generate",
        "pretrained_model_name_or_path trust_remote_code",
        "adjust_generation_fn",
        "generate",
    ),
    (GenerationMixin, "init_continuous_batching", "generation_config continuous_batching_config workload_hints"),
    (
        PreTrainedModel,
        "_load_pretrained_model",
        "model state_dict checkpoint_files load_config expected_keys",
        "from_pretrained",
    ),
    (PreTrainedModel, "_get_resized_lm_head", "old_lm_head new_num_tokens", "_resize_token_embeddings"),
    (
        PreTrainedModel,
        "_init_added_lm_head_weights_with_mean",
        "old_lm_head new_lm_head old_lm_head_dim old_num_tokens added_num_tokens transposed",
        "_get_resized_lm_head",
    ),
    (PushToHubMixin, "_upload_modified_files", "working_dir repo_id", "push_to_hub"),
    (PreTrainedModel, "_upload_modified_files", "working_dir repo_id", "save_pretrained"),
    (PreTrainedTokenizerFast, "_encode_plus", "text text_pair add_special_tokens", "__call__"),
    (PreTrainedTokenizerFast, "_decode", "token_ids skip_special_tokens", "decode"),
    (PreTrainedTokenizerFast, "_add_tokens", "new_tokens special_tokens", "add_tokens"),
    (PreTrainedTokenizerFast, "_convert_encoding", "encoding", "_encode_plus"),
    (PreTrainedTokenizerFast, "_pad", "encoded_inputs", "pad"),
    (PreTrainedTokenizerFast, "_save_pretrained", "save_directory file_names"),
    (PreTrainedTokenizerBase, "_save_pretrained", "save_directory file_names", "save_pretrained"),
)


def _signatures() -> Iterator[str]:
    for owner, name, leading, *callers in METHODS:
        if not hasattr(owner, name):
            yield f"{owner.__name__}.{name} is gone"
            continue
        expected = leading.split()
        parameters = inspect.signature(inspect.unwrap(getattr(owner, name))).parameters
        found = [parameter for parameter in parameters if parameter != "self"][: len(expected)]
        if found != expected:
            yield f"{owner.__name__}.{name} takes {found}, not {expected}"
        for caller in callers:
            if name not in _names_in(inspect.unwrap(getattr(owner, caller)).__code__):
                yield f"{owner.__name__}.{caller} no longer calls {name}"


def _names_in(code: CodeType) -> set[str]:
    """What a function's code looks up, comprehensions included."""
    nested = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(_names_in, nested))


# --- generation -------------------------------------------------------------------------------------------------------


class _ProbeConfig(PreTrainedConfig):
    model_type = "hf_cnllm_probe"
    hidden_size, num_attention_heads, num_hidden_layers, vocab_size = 2, 1, 1, 4


def _noted(name: str) -> Callable:
    """A hook of `generate` as `_compat` overrides it, which notes besides that it was called."""
    hook = getattr(modeling.GenerationHooks, name)

    @functools.wraps(hook)
    def noted(self, *args, **kwargs):
        self.calls.append(name)
        return hook(self, *args, **kwargs)

    return noted


class _Probe(modeling.GenerationHooks, PreTrainedModel, GenerationMixin):
    """Answers token 1, keeps a cache, and notes which of its hooks `generate` calls."""

    config_class = _ProbeConfig
    _supports_sdpa = True

    _prepare_position_ids_for_generation = _noted("_prepare_position_ids_for_generation")
    _expand_inputs_for_generation = _noted("_expand_inputs_for_generation")
    _prefill = _noted("_prefill")
    _prepare_static_cache = _noted("_prepare_static_cache")
    create_masks_for_generate = _noted("create_masks_for_generate")

    def __init__(self, config: _ProbeConfig):
        super().__init__(config)
        self.weight = nn.Parameter(torch.zeros(1))
        self.calls: list[str] = []
        self.lengths: list[int] = []
        self.post_init()

    def prepare_cache(self, arguments, is_assisted):
        if isinstance(arguments.get(CACHE), modeling.Cache):
            self.calls.append("_prepare_cache_for_generation")

    @modeling.takes_cache
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, use_cache=None, **kwargs):
        cache = take_cache(cache, kwargs)
        batch, length = input_ids.shape
        self.lengths.append(-1 if cache is None else int(cache.get_seq_length()))
        if cache is not None:
            cache.update(torch.zeros(batch, 1, length, 2), torch.zeros(batch, 1, length, 2), 0, kwargs=kwargs)
        logits = torch.zeros(batch, 1, 4)
        logits[..., 1] = 1
        return modeling.CausalLMOutputWithPast(logits=logits, cache=cache)


def _generation() -> Iterator[str]:
    prompt, mask = torch.tensor([[2, 2, 3], [2, 3, 3]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    hooks = ["_prepare_position_ids_for_generation", "_expand_inputs_for_generation"]
    hooks += ["_prepare_cache_for_generation", "_prefill"]
    static_cache = {"cache_implementation": "static", "disable_compile": True}
    for options, more in (({}, []), (static_cache, ["_prepare_static_cache", "create_masks_for_generate"])):
        probe = _Probe(_ProbeConfig()).eval()
        output = probe.generate(prompt, attention_mask=mask, max_new_tokens=3, do_sample=False, **options)
        for hook in hooks + more:
            if hook not in probe.calls:
                yield f"`generate` no longer calls {hook}"
        if probe.lengths != [0, 3, 4]:
            yield f"`generate` no longer hands its cache to every step (its lengths were {probe.lengths})"
        if output.tolist() != [[*row, 1, 1, 1] for row in prompt.tolist()]:
            yield f"`generate` answers {output.tolist()}"
    for name in CACHE_NAMES:
        probe = _Probe(_ProbeConfig()).eval()
        given = modeling.DynamicCache(config=_ProbeConfig())
        probe.generate(prompt, attention_mask=mask, max_new_tokens=1, do_sample=False, **{name: given})
        if probe.lengths[0] < 0:
            yield f"`generate` drops `{name}`"


# --- tokenizers -------------------------------------------------------------------------------------------------------


class _Asked(Exception):
    """The configuration was asked for an attribute, by an AutoTokenizer with these options."""


def _auto_tokenizer_asks_the_configuration() -> Iterator[str]:
    """What `_compat.TokenizerHooks` checks, it checks when these attributes are read, before any code could run."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("model_name", "tokenizer_class"):

            def ask(config):
                raise _Asked(options_of_tokenizer(folder))

            probe = type("_AskedConfig", (_ProbeConfig,), {name: property(ask, lambda self, value: None)})
            try:
                AutoTokenizer.from_pretrained(folder, config=probe(), subfolder="below")
            except _Asked as asked:
                if asked.args[0].get("subfolder") != "below":
                    yield f"AutoTokenizer keeps its options in another place when it asks for the {name}"
                continue
            except (ValueError, OSError, KeyError):
                pass
            yield f"AutoTokenizer no longer asks the configuration for its {name}"


def _batches_ask_for_their_encodings() -> Iterator[str]:
    encoding = Tokenizer(WordLevel({"a": 0}, unk_token="a")).encode("a")
    batch = LateEncodings({}, lambda: [encoding])
    if batch.tokens() != ["a"] or batch.encodings != [encoding]:
        yield "BatchEncoding no longer keeps its encodings in _encodings"


# --- layers, masks, attention, outputs --------------------------------------------------------------------------------


class _ProbeLayer(modeling.GradientCheckpointingLayer):
    def forward(self, hidden_states, cache=None, **kwargs):
        return cache


def _checkpointed_layers_drop_the_cache() -> Iterator[str]:
    layer = _ProbeLayer()
    layer.gradient_checkpointing = True
    layer.__dict__["_gradient_checkpointing_func"] = lambda function, *args, **kwargs: function(*args)
    with torch.enable_grad():
        kept = layer.train()(torch.zeros(1), cache=modeling.DynamicCache())
    if kept is not None:
        yield "GradientCheckpointingLayer keeps the cache while it checkpoints"


def _masks() -> Iterator[str]:
    config = _ProbeConfig()
    config._attn_implementation, config.sliding_window = "sdpa", 2
    inputs, padding = torch.zeros(1, 4, 2), torch.tensor([[0, 1, 1, 1]])
    causal, even = torch.ones(4, 4, dtype=torch.bool).tril(), torch.arange(4) % 2 == 0
    cases: tuple[tuple[str, dict, torch.Tensor], ...] = (
        ("create_causal_mask", {}, causal),
        ("create_causal_mask", {"or_mask_function": lambda batch, head, q, kv: kv % 2 == 0}, causal | even),
        ("create_causal_mask", {"and_mask_function": lambda batch, head, q, kv: kv % 2 == 0}, causal & even),
        ("create_sliding_window_causal_mask", {}, causal.triu(-1)),
    )
    for name, functions, expected in cases:
        mask = getattr(modeling, name)(config, inputs, padding, None, **functions)
        if not isinstance(mask, torch.Tensor) or not torch.equal(mask[0, 0, 1:], (expected & (padding != 0))[1:]):
            yield " with ".join([f"{name} gives another mask", *functions])


def _attention_functions() -> Iterator[str]:
    module = nn.Module()
    module.__dict__.update(layer_idx=0, is_causal=True, num_key_value_groups=1)
    query, key, value = torch.arange(24.0).view(3, 1, 1, 4, 2).sin()
    visible = torch.ones(4, 4, dtype=torch.bool).tril()
    scores = (query @ key.mT * 0.3).masked_fill(~visible, -torch.inf)
    expected = (scores.softmax(-1) @ value).transpose(1, 2)
    bias = torch.zeros(1, 1, 4, 4).masked_fill(~visible, torch.finfo(torch.float32).min)
    for backend, mask in (("eager", bias), ("sdpa", None)):
        function = modeling.ALL_ATTENTION_FUNCTIONS.get_interface(backend, modeling.eager_attention_forward)
        output, _ = function(module, query, key, value, mask, dropout=0.0, scaling=0.3)
        if not torch.allclose(output, expected, atol=1e-5):
            yield f"the {backend} attention function computes something else"


def _outputs_hold_the_cache() -> Iterator[str]:
    for output_class in (modeling.BaseModelOutputWithPast, modeling.CausalLMOutputWithPast):
        cache = modeling.DynamicCache()
        output = output_class(cache=cache)
        if output.cache is not cache or output[CACHE] is not cache:
            yield f"{output_class.__name__} does not hold the cache as `{CACHE}`"


PROMISES: tuple[Callable[[], Iterator[str]], ...] = (
    _signatures,
    _generation,
    _auto_tokenizer_asks_the_configuration,
    _batches_ask_for_their_encodings,
    _checkpointed_layers_drop_the_cache,
    _masks,
    _attention_functions,
    _outputs_hold_the_cache,
)
