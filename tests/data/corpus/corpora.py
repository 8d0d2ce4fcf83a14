"""Corpora made up for the tests: documents of random words, and duplicates of known similarity planted among them."""

import json
import random
from pathlib import Path

HAN = "".join(map(chr, range(0x4E00, 0x4E00 + 1500)))


def words(rng, count, chinese=False):
    return [rng.choice(HAN) if chinese else "".join(rng.choices("abcdefghij", k=4)) for _ in range(count)]


def text(tokens, chinese=False):
    return ("" if chinese else " ").join(tokens)


def similarity(first, second, n=5):
    grams = [{tuple(each[i : i + n]) for i in range(len(each) - n + 1)} for each in (first, second)]
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])


def altered(rng, tokens, target, chinese=False):
    """A copy with words replaced at random places, whose Jaccard similarity of 5-grams is as near to `target` as can be."""
    before = copy = list(tokens)
    while similarity(tokens, copy) > target:
        before, copy = copy, list(copy)
        copy[rng.randrange(len(copy))] = words(rng, 1, chinese)[0]
    return min(before, copy, key=lambda each: abs(similarity(tokens, each) - target))


def write_records(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def read_records(folder):
    return [
        json.loads(line)
        for path in sorted(Path(folder, "documents").glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


def planted(seed=0, originals=200, pairs=100, target=0.8, near_misses=100, length=150):
    """(records, ids of originals that have a duplicate). Half of it is Chinese. `near_misses` more have a copy that is only half
    as similar, which is none."""
    rng = random.Random(seed)
    records, duplicated = [], []
    for number in range(originals + pairs + near_misses):
        chinese = number % 2 == 0
        tokens = words(rng, length, chinese)
        records.append({"id": f"d{number}", "text": text(tokens, chinese)})
        if number >= originals:
            is_pair = number < originals + pairs
            copy = altered(rng, tokens, target if is_pair else target / 2, chinese)
            records.append({"id": f"d{number}-{'copy' if is_pair else 'other'}", "text": text(copy, chinese)})
            if is_pair:
                duplicated.append(f"d{number}")
    rng.shuffle(records)
    return records, duplicated
