"""The names of the originals' classes that scripts touch, read off the published code: each is here, or says what to use.

Left out are private names, names of parts (attention, MLP) that state dicts do not show, `forward`, and what
transformers' own classes have.
"""

import inspect
import re

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer

import hf_cnllm
from goldens import GOLDENS
from hf_cnllm.demo.tiny_checkpoints import TINY_FAMILIES, write_tiny_checkpoint
from hf_cnllm.families import family_of
from hf_cnllm.models.old_names import FromConfig
from tokenizer_goldens import TokenizerGolden

# Family -> where -> names.
NAMES = {
    "chatglm": {
        "model": "max_sequence_length position_encoding_2d transformer lm_head config quantized get_input_embeddings "
        "get_output_embeddings set_output_embeddings get_masks get_position_ids get_masks_and_position_ids process_response "
        "prepare_inputs_for_generation chat stream_chat stream_generate quantize",
        "model.transformer": "max_sequence_length hidden_size params_dtype num_attention_heads vocab_size num_layers "
        "layernorm_epsilon inner_hidden_size hidden_size_per_attention_head position_encoding_2d pre_seq_len prefix_projection "
        "word_embeddings gradient_checkpointing layers final_layernorm prefix_tokens prefix_encoder dropout get_prompt "
        "get_masks get_position_ids get_input_embeddings set_input_embeddings quantize",
        "tokenizer": "sp_tokenizer do_lower_case remove_space vocab_file bos_token eos_token eop_token eop_token_id mask_token "
        "gmask_token gMASK_token end_token gmask_token_id end_token_id num_image_tokens vocab_size get_vocab preprocess_text "
        "save_vocabulary build_inputs_with_special_tokens vocab_files_names model_input_names padding_side",
        "tokenizer.sp_tokenizer": "vocab_file num_image_tokens special_tokens max_blank_length byte_fallback text_tokenizer "
        "get_blank_token get_tab_token num_text_tokens num_tokens encode decode decode_tokens tokenize __getitem__",
    },
    "chatglm2": {
        "model": "max_sequence_length transformer config quantized get_masks get_position_ids process_response build_inputs "
        "build_stream_inputs prepare_inputs_for_generation chat stream_chat stream_generate quantize",
        "model.transformer": "num_layers multi_query_group_num kv_channels seq_length embedding rotary_pos_emb encoder "
        "output_layer pre_seq_len prefix_projection prefix_tokens prefix_encoder dropout get_prompt get_input_embeddings quantize",
        "tokenizer": "name tokenizer special_tokens vocab_file get_command unk_token pad_token pad_token_id eos_token "
        "eos_token_id vocab_size get_vocab get_prefix_tokens build_prompt save_vocabulary build_inputs_with_special_tokens",
        "tokenizer.tokenizer": "n_words bos_id eos_id pad_id special_tokens index_special_tokens sp_model tokenize encode decode "
        "decode_tokens convert_token_to_id convert_id_to_token",
    },
    "chatglm3": {
        "model": "max_sequence_length transformer quantized process_response chat stream_chat stream_generate quantize",
        "tokenizer": "encode_special_tokens build_single_message build_chat_input get_prefix_tokens get_command",
        "tokenizer.tokenizer": "role_special_token_expression index_special_tokens special_tokens",
    },
    "baichuan": {
        "model": "model lm_head get_input_embeddings set_input_embeddings get_output_embeddings set_output_embeddings "
        "set_decoder get_decoder quantize prepare_inputs_for_generation chat",
        "model.model": "padding_idx vocab_size embed_tokens layers norm gradient_checkpointing n_head max_cache_pos "
        "get_alibi_mask get_input_embeddings set_input_embeddings",
        "tokenizer": "sp_model sp_model_kwargs vocab_file add_bos_token add_eos_token vocab_size get_vocab "
        "convert_tokens_to_string save_vocabulary build_inputs_with_special_tokens get_special_tokens_mask "
        "create_token_type_ids_from_sequences pretrained_vocab_files_map",
    },
    "qwen": {
        "model": "transformer lm_head get_output_embeddings set_output_embeddings chat chat_stream generate quantize",
        "model.transformer": "vocab_size num_hidden_layers embed_dim use_dynamic_ntk seq_length use_flash_attn is_fp32 "
        "use_cache_quantization gradient_checkpointing wte drop h ln_f rotary_emb get_ntk_alpha get_input_embeddings "
        "set_input_embeddings",
        "tokenizer": "errors mergeable_ranks special_tokens encoder tokenizer eod_id im_start_id im_end_id max_len get_vocab "
        "vocab_size all_special_tokens all_special_ids convert_tokens_to_ids convert_tokens_to_string save_vocabulary tokenize",
    },
    "glm": {
        "model": "glm config prepare_inputs_for_generation",
        "model.glm": "output_predict transformer word_embeddings get_input_embeddings set_input_embeddings",
        "model.glm.transformer": "embedding_dropout position_embeddings block_position_embeddings layers final_layernorm",
        "tokenizer": "sop_token sop_token_id eop_token eop_token_id gmask_token_id smask_token_id mask_token_ids sp_model "
        "build_inputs_for_generation build_inputs_for_multiple_choice vocab_size get_vocab convert_tokens_to_string",
    },
}
# Methods that are no more, and what they say.
REFUSED = {
    "get_masks": "pass the tokenizer's `attention_mask`",
    "get_position_ids": "pass the tokenizer's `position_ids`",
    "get_masks_and_position_ids": "pass the tokenizer's `position_ids`",
    "get_prompt": r"`prefix_encoder\(batch_size, dtype\)` gives the keys and values",
    "build_stream_inputs": "stream_chat goes on with the cache",
    "get_alibi_mask": "the mask is made inside",
    "preprocess_text": "as `do_lower_case` and `remove_space` say",
    "text_tokenizer": "use sp_tokenizer itself",
    ("baichuan", "quantize"): "quantize the model while it is loaded",
    ("qwen", "quantize"): "quantize the model while it is loaded",
}
# Passing states of the originals: they name what a forward pass left behind.
GONE = {"baichuan": ("first_run", "alibi_mask"), "qwen": ("registered_causal_mask",)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    written = {}
    for family in TINY_FAMILIES:
        write_tiny_checkpoint(family, folder := tmp_path_factory.mktemp("names") / family)
        written[family] = folder
    return written


@pytest.fixture(scope="module")
def loaded(folders):
    def load(folder):
        auto = getattr(transformers, family_of(AutoConfig.from_pretrained(folder)).generates_with)
        return {"model": auto.from_pretrained(folder), "tokenizer": AutoTokenizer.from_pretrained(folder)}

    return {family: load(folder) for family, folder in folders.items()}


def owner(loaded, family, path):
    first, *rest = path.split(".")
    found = loaded[family][first]
    for name in rest:
        found = getattr(found, name)
    return found


PLACES = [(family, place) for family, places in NAMES.items() for place in places]


@pytest.mark.parametrize("family, path", PLACES, ids=map("-".join, PLACES))
def test_every_name_is_here_or_says_what_to_use(loaded, family, path):
    holder = owner(loaded, family, path)
    for name in NAMES[family][path].split():
        sentence = REFUSED.get((family, name)) or REFUSED.get(name)
        if sentence is None:
            getattr(holder, name)
        elif name == "text_tokenizer":
            with pytest.raises(AttributeError, match=sentence):
                getattr(holder, name)
        else:
            with pytest.raises(NotImplementedError, match=sentence):
                getattr(holder, name)(8)
    assert not any(hasattr(holder, name) for name in GONE.get(family, ()))


def names_from_config(model):
    return {name: held.field for name, held in inspect.getmembers(type(model)) if isinstance(held, FromConfig)}


@pytest.mark.parametrize("family", NAMES)
def test_values_from_the_configuration_are_set_when_loading(loaded, family):
    model = loaded[family]["model"]
    for part in (model, model.base_model):
        for name, field in names_from_config(part).items():
            held = getattr(part, name)
            setattr(part, name, held)  # no change
            with pytest.raises(ValueError, match=rf"takes `{field}` from its configuration.*set it when loading"):
                setattr(part, name, "another")
            assert getattr(part, name) == held


@pytest.mark.parametrize("family", ["chatglm", "qwen"])
def test_resizing_sets_the_vocabulary_size(folders, family):
    model = AutoModel.from_pretrained(folders[family])
    size = model.config.vocab_size + 8
    model.resize_token_embeddings(size)
    assert model.vocab_size == model.config.vocab_size == size


def test_values_are_those_of_the_configuration(loaded):
    for family in ("chatglm", "chatglm2", "chatglm3"):
        model = loaded[family]["model"]
        assert model.max_sequence_length == model.config.max_position_embeddings
        assert model.transformer.num_layers == model.config.num_layers and model.quantized is False
    model = loaded["chatglm"]["model"]
    assert model.position_encoding_2d is True and model.transformer.params_dtype == torch.float32
    assert loaded["qwen"]["model"].transformer.get_ntk_alpha(33 * model.config.hidden_size) >= 1
    assert loaded["baichuan"]["model"].model.n_head == loaded["baichuan"]["model"].config.num_attention_heads
    with_prefix = hf_cnllm.ChatGLMModel(AutoConfig.from_pretrained(GOLDENS / "chatglm3_6b_ptuning"))
    assert with_prefix.prefix_tokens.tolist() == list(range(with_prefix.config.pre_seq_len))
    assert isinstance(with_prefix.dropout, torch.nn.Dropout)


def test_nothing_breaks_that_looks_at_every_attribute(loaded):
    for parts in loaded.values():
        inspect.getmembers(parts["model"])


# ---- keywords ----


@pytest.mark.parametrize("family", ("chatglm", "chatglm2", "chatglm3"))
def test_empty_init_and_device(folders, family, loaded):
    model = AutoModel.from_pretrained(folders[family], trust_remote_code=True, empty_init=False, device="cpu")
    expected = loaded[family]["model"].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert type(AutoModel.from_config(model.config, empty_init=True)) is type(model)
    for door in (hf_cnllm.ChatGLMModel, hf_cnllm.ChatGLMForSequenceClassification):
        assert door(model.config, empty_init=False, device=None).config is model.config
        with pytest.raises(ValueError, match=re.escape("write `with torch.device('cuda'):` around it")):
            door(model.config, device="cuda")


def test_switches_of_qwen(folders, caplog):
    switches = {
        "use_cache_quantization": True,
        "use_cache_kernel": True,
        "softmax_in_fp32": True,
        "use_flash_attn": False,
    }
    for auto in (transformers.AutoModelForCausalLM, hf_cnllm.QWenLMHeadModel):
        model = auto.from_pretrained(folders["qwen"], trust_remote_code=True, fp32=True, **switches)
        assert {name: getattr(model.config, name) for name in switches} == switches
    transformers.utils.logging.get_logger("hf_cnllm").warning_once.cache_clear()
    with caplog.at_level("WARNING"):
        hf_cnllm.QWenConfig(**switches)
    for name in ("use_cache_quantization", "use_cache_kernel", "softmax_in_fp32"):
        assert f"`{name}` is not in use here; " in caplog.text


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_bits_as_keywords_mean_bitsandbytes(folders, family):
    auto = getattr(transformers, family_of(AutoConfig.from_pretrained(folders[family])).generates_with)
    with pytest.raises(ValueError, match="give either load_in_8bit or quantization_config, not both"):
        auto.from_pretrained(
            folders[family], load_in_8bit=True, quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True)
        )
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="bitsandbytes"):
            auto.from_pretrained(folders[family], load_in_8bit=True)


def test_return_last_logit(loaded):
    model = loaded["chatglm3"]["model"]
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(model(ids, return_last_logit=True).logits, model(ids).logits[:, -1:])


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_arguments_that_nothing_is_computed_with(loaded, family):
    model, ids = loaded[family]["model"], loaded[family]["tokenizer"]("a[MASK]", return_tensors="pt")["input_ids"]
    if family != "glm":  # whose inputs are more than ids
        model(ids, head_mask=None)
    for name in ("head_mask", "encoder_hidden_states", "mems"):
        with pytest.raises(ValueError, match=f"`{name}` has no effect here"):
            model(ids, **{name: torch.ones(1)})


# ---- the tokenizers inside the tokenizers ----

TEXTS = ("你好，world 123\n  x\t。", "<|user|>[gMASK]sop</s><unk>", "", " a", "[MASK]<eop><n>", "龘😀")


@pytest.mark.parametrize("name", ("chatglm1", "chatglm2", "chatglm3"))
@pytest.mark.parametrize("size", ("", "_small"))
def test_vocabulary_alone_is_sentencepiece(name, size):
    tokenizer = TokenizerGolden(name + size).load(AutoTokenizer)
    inner = tokenizer.sp_tokenizer if name == "chatglm1" else tokenizer.tokenizer
    control = {*tokenizer.control_tokens.values()}
    for text in TEXTS:
        ids = inner.encode(text)
        assert not control & {*ids}
        assert inner.tokenize(text) == tokenizer.convert_ids_to_tokens(ids)
        assert inner.decode(ids) == inner.decode_tokens(inner.tokenize(text)) == tokenizer.decode(ids)
        if name != "chatglm1":  # whose white space the original put into words of its own
            assert ids == tokenizer.sp_model.encode(text)
    assert (
        inner.convert_id_to_token(10**6) == "" and inner.convert_token_to_id("no such token") == tokenizer.unk_token_id
    )
    if name == "chatglm1":
        assert inner["<eop>"] == tokenizer.eop_token_id and inner[inner["<eop>"]] == "<eop>"
        assert inner.get_blank_token(3) == "<|blank_3|>" and inner.num_tokens == inner.num_text_tokens
        assert inner.encode("a", linebreak=True, add_dummy_prefix=True) == inner.encode("a")
        with pytest.raises(ValueError, match="add_dummy_prefix=False is not available here"):
            inner.tokenize("a", add_dummy_prefix=False)
        return
    assert inner.encode("a", bos=True, eos=True) == [inner.bos_id, *inner.encode("a"), inner.eos_id]
    assert inner.n_words == len(tokenizer) and inner.sp_model.vocab_size() == inner.n_words - len(control)
    assert all(inner.special_tokens[token] == index for index, token in inner.index_special_tokens.items())


@pytest.mark.parametrize("family", ("chatglm2", "chatglm3"))
def test_texts_of_a_chat_are_texts_by_the_old_names_too(loaded, family):
    model, tokenizer = loaded[family]["model"], loaded[family]["tokenizer"]
    control = torch.tensor([*tokenizer.control_tokens.values(), tokenizer.eos_token_id])
    text = "".join([*tokenizer.control_tokens, "</s>"])
    assert not set(tokenizer.tokenizer.encode(text)) & set(control.tolist())
    if family == "chatglm2":
        harmless, attack = (model.build_inputs(tokenizer, t, [(t, t)])["input_ids"] for t in ("a", text))
        assert torch.isin(attack, control).sum() == torch.isin(harmless, control).sum() == 2


def test_roles_are_tokens_where_a_script_says_so():
    inner = TokenizerGolden("chatglm3_small").load(AutoTokenizer).tokenizer
    assert inner.tokenize("a<|user|>", encode_special_tokens=True) == [*inner.tokenize("a"), "<|user|>"]
    assert "<|user|>" not in inner.tokenize("a<|user|>")


@pytest.mark.parametrize("name", ("qwen_small", "qwen"))
def test_qwens_tiktoken(name):
    tokenizer = TokenizerGolden(name).load(AutoTokenizer)
    for text in TEXTS:
        assert tokenizer.tokenizer.encode(text, allowed_special="all") == tokenizer.encode(text)
    assert tokenizer.tokenizer.n_vocab == len(tokenizer) and tokenizer.tokenizer.eot_token == tokenizer.eod_id
    assert tokenizer.encoder == tokenizer.mergeable_ranks
