"""What the papers say that their mechanisms save, measured on one layer's scale or computed for the published sizes.

    python scripts/efficiency.py                 # minutes of one core
    python scripts/efficiency.py --device cuda

- multi-query attention (ChatGLM2): decoding and cache beside the same model with a key and a value of its own for each head;
- INT4 (ChatGLM2's card: 8,192 tokens of dialogue in 6 GB, where ChatGLM-6B holds 1,024): bytes of weights and cache by length;
- the loss in chunks (this package) beside all logits at a vocabulary of 125,696;
- ALiBi folded into plain attention beside the dense bias.

Everything measured runs in turns; ratios are medians over the rounds. Writes `table.md`, `results.json`, `plot.png` to --output.
"""

from types import SimpleNamespace

import torch
from matplotlib.figure import Figure
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from benchmark.measure import MIB, peak_growth, take_turns
from benchmark.tasks import Training
from benchmark_alibi import make as make_attention
from hf_cnllm import BaichuanForCausalLM
from hf_cnllm.cli.memory import sizes_of
from hf_cnllm.families import Shape, family_with
from study import markdown, study_arguments, write_study

GB = 1e9
LENGTHS = (1024, 2048, 4096, 8192, 32768)
DECODED = 16  # steps of a round
# The sizes of the published config.json files.
PUBLISHED = {
    "ChatGLM-6B": {
        "vocab_size": 130528, "hidden_size": 4096, "num_layers": 28, "num_attention_heads": 32, "inner_hidden_size": 16384,
        "position_encoding_2d": True, "max_sequence_length": 2048,
    },
    "ChatGLM2-6B": {
        "padded_vocab_size": 65024, "hidden_size": 4096, "num_layers": 28, "num_attention_heads": 32, "kv_channels": 128,
        "ffn_hidden_size": 13696, "multi_query_attention": True, "multi_query_group_num": 2, "seq_length": 32768,
        "add_qkv_bias": True,
    },
}  # fmt: skip


@torch.inference_mode()
def decode(model, cache_tokens: int):
    """A function that decodes some tokens behind a cache of that length, and the cache's MiB."""
    ids = torch.randint(3, 200, (1, cache_tokens), device=model.device)
    cache = DynamicCache(config=model.config)
    model(ids, cache=cache, use_cache=True, logits_to_keep=1)
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / MIB

    @torch.inference_mode()
    def run() -> None:
        for _ in range(DECODED):
            model(ids[:, -1:], cache=cache, use_cache=True)
        cache.crop(-DECODED)

    return run, stored


def multi_query(args) -> dict[str, list]:
    """cache length -> [ratio of time, ratio of cache]."""
    family, shape = family_with("chatglm2"), Shape(args.hidden_size, 4, 16, args.hidden_size * 8 // 3, 4096)
    models = {}
    for name, shared in (("multi-query", True), ("multi-head", False)):
        config = family.make_config("chatglm2", shape, multi_query_attention=shared, multi_query_group_num=2)
        torch.manual_seed(0)
        models[name] = AutoModelForCausalLM.from_config(config).to(args.device).eval()
    results = {}
    for length in args.lengths:
        runs = {name: decode(model, length) for name, model in models.items()}
        times = take_turns({name: run for name, (run, _) in runs.items()}, args.rounds, torch.device(args.device))
        results[length] = [times.ratio("multi-query", "multi-head")[1], runs["multi-query"][1] / runs["multi-head"][1]]
    return results


def int4_memory() -> dict[str, dict[int, float]]:
    """model -> dialogue length -> GB with INT4 weights and a cache of 16 bits."""
    sizes = {name: sizes_of(AutoConfig.for_model("chatglm", **fields)) for name, fields in PUBLISHED.items()}
    return {
        name: {length: (one.weight_bytes(4, 2) + one.cache_bytes(length)) / GB for length in LENGTHS}
        for name, one in sizes.items()
    }


def chunked_loss(args) -> tuple[float, float | None]:
    """(ratio of time, ratio of peak memory) of a training step with the loss in chunks, by that with all logits."""
    shape = Shape(args.hidden_size, 2, 8, args.hidden_size * 8 // 3, args.vocabulary)
    config = family_with("baichuan-rope").make_config("baichuan-rope", shape)
    ids = torch.randint(3, args.vocabulary - 16, (1, args.train_tokens), device=args.device)
    training = Training(BaichuanForCausalLM(config).to(args.device), ids)
    runs = {"chunked": training.step, "all logits": training.step_with_logits}
    times = take_turns(runs, args.rounds, torch.device(args.device))
    peaks = [peak_growth(run, torch.device(args.device)) for run in runs.values()]
    return times.ratio("chunked", "all logits")[1], peaks[0] / peaks[1] if all(peaks) else None


def folded_alibi(args) -> dict[int, list]:
    """length -> [ratio of time, ratio of peak memory] of folded ALiBi by the dense bias."""
    results = {}
    for length in args.lengths:
        runs = {form: make_attention(form, 8, 64, length, torch.float32, args.device) for form in ("folded", "dense")}
        with torch.no_grad():
            times = take_turns(runs, args.rounds, torch.device(args.device))
            peaks = [peak_growth(run, torch.device(args.device)) for run in runs.values()]
        results[length] = [times.ratio("folded", "dense")[1], peaks[0] / peaks[1] if all(peaks) else None]
    return results


def main() -> None:
    parser = study_arguments(__doc__, "efficiency")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 4096], help="of caches and of attention")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=125_696)
    parser.add_argument("--train-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    results = SimpleNamespace(
        multi_query=multi_query(args), int4_gb=int4_memory(), chunked_loss=chunked_loss(args), alibi=folded_alibi(args)
    )

    def both(time: float, memory: float | None) -> list[str]:
        return [f"{time:.2f}", "" if memory is None else f"{memory:.2f}"]

    rows = [
        [f"multi-query by multi-head, {n} tokens in the cache", *both(*pair)]
        for n, pair in results.multi_query.items()
    ]
    rows += [["loss in chunks by all logits, a training step", *both(*results.chunked_loss)]]
    rows += [[f"folded ALiBi by the dense bias, {n} tokens", *both(*pair)] for n, pair in results.alibi.items()]
    table = markdown(["", "time", "memory"], rows) + "\n\n"
    table += markdown(
        ["INT4, GB with a dialogue of", *(f"{length:,}" for length in LENGTHS)],
        [[name, *(f"{value:.2f}" for value in line.values())] for name, line in results.int4_gb.items()],
    )
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    for name, line in results.int4_gb.items():
        axes.plot(line.keys(), line.values(), marker="o", label=name)
    axes.axhline(6, color="gray", linestyle=":", label="6 GB")
    axes.set(xscale="log", xlabel="tokens of dialogue", ylabel="GB with INT4 weights")
    axes.legend()
    write_study(args.output, table, vars(results), figure)


if __name__ == "__main__":
    main()
