"""ChatGLM's recorded vocabularies, and texts of what its tokenizers could stumble on."""

from hypothesis import strategies as st

ICE = ("chatglm1", "chatglm1_image20000", "chatglm1_small")
BPE = ("chatglm2", "chatglm2_small", "chatglm3", "chatglm3_small")
SMALL = ("chatglm1_small", "chatglm2_small", "chatglm3_small")

ATOMS = [
    *("你好", "世界。", "Hello", " world", "a", "B", "123", "0.5", "，", "！", "……", "ｆｕｌｌ", "１２"),
    *(" ", "  ", "   ", " " * 81, "\n", "\t", "\r\n", "\u3000", "\xa0", "\u2028", "\x85", "▁", "\u200b", "\ufeff"),
    *("<n>", "<|tab|>", "<|blank_2|>", "<|blank_80|>", "<", "n>", "|", "<0x41>", "<image_5>", "＜n＞"),
    *("[gMASK]", "[MASK]", "[sMASK]", "<sop>", "<eop>", "sop", "eop", "<unk>", "<pad>", "<s>", "</s>", "people"),
    *("<|user|>", "<|assistant|>", "<|observation|>", "<|system|>", "<|endoftext|>"),
    *("e\u0301", "か\u3099", "ﾊﾟ", "\u1112\u1161\u11ab", "각\u11a8", "\u0338", "\u0301", "\u0e33", "ﬁ", "ﷺ", "①", "㍿"),
    *("👨\u200d👩\u200d👧", "🇨🇳", "龘", "𠮷", "\ue000", "\ufdd0", "\U0010ffff", "\x00", "\x01", "\x7f", "\ufffd"),
    *("def f(x):\n    return x\n", "I'm", "n't", " .", "?", "!!!!"),
]
# Without the code points, assigned to nothing, that the backend uses for itself.
CHARACTERS = st.characters(
    exclude_categories=["Cs"], exclude_characters="\U000e0f00\U000e0f01\U000e0f02\U000e0ffe\U000e0fff"
)
TEXTS = st.lists(st.sampled_from(ATOMS) | st.text(CHARACTERS, max_size=3), max_size=12).map("".join)
