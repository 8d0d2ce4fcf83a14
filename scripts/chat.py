"""Chat with a checkpoint in the terminal, the reply streamed as it is written.

    python scripts/chat.py --model PATH [--adapter PATH] [--system TEXT] [--greedy]

An empty line ends the chat; /new starts another one.
"""

import argparse
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import hf_cnllm  # noqa: F401  registers the families
from hf_cnllm.data.conversations import reply_end_ids


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="checkpoint to chat with")
    parser.add_argument("--adapter", help="LoRA adapter on top of it")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--greedy", action="store_true", help="the likeliest reply instead of a sampled one")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    return parser.parse_args()


def main() -> int:
    args = parse()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    if args.adapter:
        model = PeftModel.from_pretrained(model, args.adapter)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    options = {
        "max_new_tokens": args.max_new_tokens,
        "eos_token_id": reply_end_ids(tokenizer, model.generation_config),
    }
    if args.greedy:
        options |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    opening = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(opening)
    while question := _read():
        if question == "/new":
            messages = list(opening)
            continue
        messages.append({"role": "user", "content": question})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(model.device)
        output = model.generate(**inputs, **options, streamer=streamer)
        reply = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": reply.strip()})
    return 0


def _read() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"chat.py: error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit(130)
