"""What tests of chats know of Baichuan's small vocabularies, and transformers' own rendering, which is their reference."""

from transformers import TokenizersBackend

NAMES = ("baichuan1_small", "baichuan2_small")
EOS = 2


def control_ids(tokenizer) -> set[int]:
    pieces = tokenizer.get_vocab()
    return {index for piece, index in pieces.items() if piece.startswith("<reserved_")} | {0, 1, 2, 3, 4}


def standard(tokenizer, *args, **kwargs):
    return TokenizersBackend.apply_chat_template(tokenizer, *args, **kwargs)


def as_lists(batch):
    if not hasattr(batch, "items"):
        return batch.tolist() if hasattr(batch, "tolist") else batch
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in batch.items()}
