"""Loading, generating, chatting, serving and compiling."""

import contextlib
import io
from collections.abc import Callable

import torch
import transformers
from transformers import AutoConfig, pipeline

from hf_cnllm import vllm as vllm_models
from hf_cnllm.families import family_of
from hf_cnllm.vllm.served import check_served

from .place import ANSWER, CHAT, NEW_TOKENS, TEXT, TEXTS, Doors, Place, entering, same

DOORS: Doors = {}
door = entering(DOORS)

# --- loading ---------------------------------------------------------------------------------------------------------


@door("AutoConfig")
def auto_config(place):
    assert family_of(AutoConfig.from_pretrained(place.folder)) is not None


@door("AutoTokenizer")
def auto_tokenizer(place):
    tokenizer, text = place.tokenizer(), "天空为什么是蓝色的"  # some make a full-width question mark a narrow one
    assert type(tokenizer).__module__.startswith("hf_cnllm.")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids).strip() == text


@door("AutoModel")
def auto_model(place):
    example = place.example()
    del example["labels"]
    output = place.load("AutoModel")(**example)
    assert output[0].isfinite().all() and output[0].shape[:2] == example["input_ids"].shape


@door("AutoModelForCausalLM")
def auto_causal(place):
    model = place.load("AutoModelForCausalLM")
    assert place.logits(model).shape[-1] == model.config.vocab_size


@door("AutoModelForSeq2SeqLM")
def auto_seq2seq(place):
    model = place.load("AutoModelForSeq2SeqLM")
    assert place.logits(model).shape[-1] >= model.config.vocab_size


@door("AutoModelForSequenceClassification")
def classification(place):
    auto_class = transformers.AutoModelForSequenceClassification
    model = auto_class.from_pretrained(place.folder, num_labels=3, dtype=torch.float32)
    ids = place.example()["input_ids"]
    loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor([1])).loss
    loss.backward()
    assert model.config.num_labels == 3 and loss.isfinite()


@door("dtype=torch.bfloat16")
def bf16(place):
    model = place.model(dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    place.new_ids(model)
    same(place.logits(model), place.logits(place.model()), atol=0.3)


@door('device_map="auto"')
def device_map(place):
    assert place.new_ids(place.model(device_map="auto")) == place.new_ids()


def with_attention(name: str) -> Callable[[Place], None]:
    def run(place):
        model = place.model(attn_implementation=name)
        assert model.config._attn_implementation == name
        same(place.logits(model), place.logits(place.model(attn_implementation="eager")))

    return run


for backend in ("eager", "sdpa", "flex_attention"):
    DOORS[f'attn_implementation="{backend}"'] = with_attention(backend)


@door("resize_token_embeddings")
def resize(place):
    model, before = place.model(), place.logits(place.model())
    size = before.shape[-1] + 8
    model.resize_token_embeddings(size)
    after = place.logits(model)
    assert after.shape[-1] == size
    same(after[..., : before.shape[-1]], before)


# --- generating ------------------------------------------------------------------------------------------------------


@door("generate, greedy")
def greedy(place):
    with torch.no_grad():
        assert place.new_ids(use_cache=True) == place.new_ids(use_cache=False)


@door("generate, sampling")
def sampling(place):
    answers = []
    for _ in range(2):
        transformers.set_seed(1)
        answers.append(place.new_ids(do_sample=True, top_p=0.9, temperature=1.5))
    assert answers[0] == answers[1]


@door("generate, beams")
def beams(place):
    assert place.new_ids(num_beams=3) == place.new_ids(num_beams=3, use_cache=False)


@door('generate, cache_implementation="static"')
def static_cache(place):
    assert place.new_ids(cache_implementation="static", disable_compile=True) == place.new_ids()


@door("generate, assistant_model")
def assisted(place):
    assert place.new_ids(assistant_model=place.model()) == place.new_ids()


@door("generate, prompt_lookup_num_tokens")
def prompt_lookup(place):
    assert place.new_ids(prompt_lookup_num_tokens=2) == place.new_ids()


@door("generate, TextStreamer")
def streamer(place):
    tokenizer, text = place.tokenizer(), io.StringIO()
    with contextlib.redirect_stdout(text):
        ids = place.new_ids(streamer=transformers.TextStreamer(tokenizer, skip_prompt=True))
    assert text.getvalue().strip() == tokenizer.decode(ids).strip()


@door("generate_batch")
def generate_batch(place):
    ids = place.prompt()["input_ids"][0].tolist()
    config = transformers.GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    options = transformers.ContinuousBatchingConfig(num_blocks=32, block_size=16, max_batch_tokens=64)
    results = place.model().generate_batch([ids], generation_config=config, continuous_batching_config=options)
    (result,) = results.values()
    assert result.generated_tokens == place.new_ids()


def text_generation(place):
    pipe = pipeline("text-generation", model=str(place.folder), dtype=torch.float32)
    pipe.tokenizer.padding_side = "left"
    pipe.tokenizer.pad_token = pipe.tokenizer.pad_token or pipe.tokenizer.eos_token
    pipe.model.generation_config.suppress_tokens = [*range(len(pipe.tokenizer), pipe.model.config.vocab_size)]
    return lambda texts, **options: [
        answer[0]["generated_token_ids"][-NEW_TOKENS:]
        for answer in pipe(texts, max_new_tokens=NEW_TOKENS, do_sample=False, return_tensors=True, **options)
    ]


@door('pipeline("text-generation")')
def pipe(place):
    (answer,) = text_generation(place)([TEXT])
    assert len(answer) == NEW_TOKENS


@door('pipeline("text-generation"), batched')
def pipe_batched(place):
    ask = text_generation(place)
    assert ask(TEXTS, batch_size=3) == [ask([text])[0] for text in TEXTS]


# --- chatting --------------------------------------------------------------------------------------------------------


@door("apply_chat_template")
def chat_template(place):
    tokenizer = place.tokenizer()
    one = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    two = tokenizer.apply_chat_template(CHAT + ANSWER)["input_ids"]
    assert 0 < len(one) < len(two) and "你好" in tokenizer.decode(one)


@door("model.chat")
def chat(place):
    question = CHAT if place.family == "baichuan" else TEXT
    model = place.model()
    model.generation_config.max_new_tokens = NEW_TOKENS
    answer = model.chat(place.tokenizer(), question)
    assert isinstance(answer if place.family == "baichuan" else answer[0], str)


@door("transformers serve (class lookup)")
def serve(place):
    """What the server does with a config.json: `getattr(transformers, architectures[0])`; tests/integrations/test_serve.py runs it."""
    model = getattr(transformers, AutoConfig.from_pretrained(place.folder).architectures[0]).from_pretrained(
        place.folder
    )
    assert model.can_generate()
    assert place.tokenizer().apply_chat_template(CHAT, tokenize=False)


@door("vLLM (model registry)")
def vllm_registry(place):
    """What vLLM looks up, and asks before it loads; tests/vllm_engine runs it."""
    config = AutoConfig.from_pretrained(place.folder)
    assert config.architectures[0] in vllm_models.MODELS
    check_served(config)


# --- torch -----------------------------------------------------------------------------------------------------------


@door("torch.compile")
def compiled(place):
    model, expected = place.model(), place.logits(place.model())
    torch.compiler.reset()
    with torch.compiler.set_stance("default"):
        same(place.logits(torch.compile(model, backend="eager")), expected)


@door("torch.export")
def exported(place):
    model, example = place.model(), place.example()
    del example["labels"]
    program = torch.export.export(model, (), example | {"use_cache": False})
    same(program.module()(**example, use_cache=False).logits, place.logits(model))
