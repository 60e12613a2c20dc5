"""Random texts that the data tests share."""

from __future__ import annotations

import random

ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz",
    "ABCXYZ0123456789",
    " \t\n\r\u00a0\u2003\u3000\v\f\u0085\u2028",
    ".,;:!?'\"()[]{}<>|/\\@#$%^&*_-+=~`’“”—",
    "äöüßéèñçøåłžαβγδабвгд",
    "日本語漢字かなカナ한국어العربيةहिन्दी",
    "😀🎉👩\u200d👩\u200d👧\u200d👦🏽🇩🇪\ufe0f",
    "\u0301\u0308\u0000\u0007\u001b\ufeff\ufffd\uffff\U0010ffff\ue000",
)
SPECIALS = ("<|endoftext|>", "don't", "WE'LL", "  ", "\n\n\n", "\r\n", "</s>", "Ġ", "Ċ", "1815")


def random_text(seed: int, length: int = 60) -> str:
    """Return a text of words, blanks, signs, scripts, emoji and control characters."""
    rng = random.Random(seed)
    parts = []
    for _ in range(rng.randrange(1, length)):
        if rng.random() < 0.1:
            parts.append(rng.choice(SPECIALS))
        else:
            alphabet = rng.choice(ALPHABETS)
            parts.append("".join(rng.choices(alphabet, k=rng.randrange(1, 6))))
    return "".join(parts)


def prose(seed: int, words: int) -> str:
    """Return lines and paragraphs of made-up words."""
    rng = random.Random(seed)
    lexicon = ["".join(rng.choices("abcdefghij", k=rng.randrange(2, 8))) for _ in range(200)]
    parts = []
    for number in range(words):
        parts.append(rng.choice(lexicon))
        parts.append("\n\n" if number % 60 == 59 else "\n" if number % 12 == 11 else " ")
    return "".join(parts)
