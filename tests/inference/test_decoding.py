from __future__ import annotations

import random

import pytest

from mamba2lm.data import Tokenizer
from mamba2lm.inference.decoding import Row, StopStrings
from tests.inference import helpers


def cut_by_characters(text: str, stops: list[str]) -> tuple[str, bool]:
    """Return the text before the stop string that a reader of single characters meets first."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], True
    return text, False


def test_stop_strings_cut_the_same_whatever_the_pieces() -> None:
    rng = random.Random(0)
    found = 0
    for _ in range(2000):
        text = "".join(rng.choices("abc", k=rng.randint(0, 12)))
        stops = ["".join(rng.choices("abc", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        stop, given, position = StopStrings(stops), "", 0
        while position < len(text) and not stop.found:
            size = rng.randint(1, 4)
            given += stop.push(text[position : position + size])
            # What was given out never has to be taken back.
            assert cut_by_characters(text, stops)[0].startswith(given)
            position += size
        given += stop.flush()
        assert (given, stop.found) == cut_by_characters(text, stops), (text, stops)
        found += stop.found
    assert 500 < found < 1900


def row(tokenizer: Tokenizer, *, stop: list[str] | None = None, tokens: int = 100) -> Row:
    return Row(tokenizer, max_new_tokens=tokens, stop=stop or [])


def test_pieces_never_end_within_a_character() -> None:
    tokenizer = Tokenizer.of_bytes()
    text = "né €uro 😀 한글"
    started = row(tokenizer)
    pieces = [started.extend([byte]) for byte in text.encode()]
    # Each character comes whole, with its last byte.
    expected = [[""] * (len(c.encode()) - 1) + [c] for c in text]
    assert pieces == [piece for character in expected for piece in character]
    assert started.text == text


def test_bytes_that_are_no_character_are_replaced_at_the_end() -> None:
    tokenizer = Tokenizer.of_bytes()
    started = row(tokenizer, tokens=3)
    pieces = [started.extend([byte]) for byte in [0x61, 0xE2, 0x82]]
    assert pieces == ["a", "", "\ufffd"]
    assert started.finish_reason == "length"


def test_a_stop_string_across_tokens_and_characters() -> None:
    tokenizer = Tokenizer.of_bytes()
    started = row(tokenizer, stop=["€ ", "zzz"])
    given = ""
    for byte in "price: 3 €uro, 4 € each".encode():
        given += started.extend([byte])
        if started.finish_reason:
            break
    assert given == started.text == "price: 3 €uro, 4 "
    assert started.finish_reason == "stop"


@pytest.mark.parametrize("reason", ["length", "eos"])
def test_text_held_back_for_a_stop_string_comes_at_the_end(reason: str) -> None:
    tokenizer = Tokenizer.of_bytes()
    started = row(tokenizer, stop=["END!"], tokens=6 if reason == "length" else 100)
    pieces = [started.extend([byte]) for byte in b"so END"]
    if reason == "eos":
        assert pieces[-1] == ""
        assert started.extend([tokenizer.eos_id]) == "END"
    assert started.text == "so END"
    assert started.finish_reason == reason
    assert bytes(started.token_ids) == b"so END"


def test_the_separator_is_no_part_of_text_or_ids() -> None:
    tokenizer = helpers.tokenizer()
    ids = tokenizer.encode("It is a truth")
    started = row(tokenizer)
    for token in [*ids, tokenizer.eos_id]:
        started.extend([token])
    assert started.text == "It is a truth"
    assert started.token_ids == ids
    assert started.finish_reason == "eos"
    assert started.ended_by == tokenizer.eos_id


def test_stop_tokens_end_a_text_and_the_separator_may_be_ignored() -> None:
    tokenizer = Tokenizer.of_bytes()
    started = Row(tokenizer, max_new_tokens=100, stop_token_ids=[ord("!")], ignore_eos=True)
    for token in [ord("a"), tokenizer.eos_id, ord("b"), ord("!")]:
        assert started.finish_reason is None
        started.extend([token])
    assert started.text == "ab"
    assert started.token_ids == [ord("a"), tokenizer.eos_id, ord("b")]
    assert started.finish_reason == "stop"
    assert started.ended_by == ord("!")
    assert started.left == 97


@pytest.mark.parametrize("tokenizer", [Tokenizer.of_bytes(), helpers.tokenizer()])
def test_several_tokens_at_once_are_one_after_the_other(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    text = "né €uro, price: 3 € each; the end is near 😀 END of it"
    ended = set()
    for _ in range(300):
        ids = [
            *tokenizer.encode(text),
            *rng.choices([tokenizer.eos_id, *tokenizer.encode(text)], k=9),
        ]
        stop = rng.choice([[], ["END"], ["€ e", "near"]])
        options = {"stop": stop, "max_new_tokens": rng.randint(1, len(ids))}
        one = Row(tokenizer, **options)  # type: ignore[arg-type]
        for token in ids:
            if one.finish_reason is None:
                one.extend([token])
        many = Row(tokenizer, **options)  # type: ignore[arg-type]
        given, place = "", 0
        while many.finish_reason is None and place < len(ids):
            size = rng.randint(1, 9)
            given += many.extend(ids[place : place + size])
            place += size
        assert given == many.text == one.text
        for name in ("token_ids", "finish_reason", "ended_by", "left"):
            assert getattr(many, name) == getattr(one, name)
        ended.add(many.finish_reason)
    assert {"stop", "eos", "length"} <= ended


def test_a_text_that_nobody_reads_is_decoded_at_its_end() -> None:
    tokenizer = helpers.tokenizer()
    ids = tokenizer.encode("She was — naïvely — at home.")
    for stop, early in (([], False), ([" at"], True)):
        rows = [
            Row(tokenizer, max_new_tokens=100, stop=stop, grows=grows) for grows in (True, False)
        ]
        for row in rows:
            row.extend(ids[:5])
        assert rows[0].text
        assert bool(rows[1].text) == early
        for row in rows:
            row.extend(ids[5:])
            if row.finish_reason is None:
                row.finish("length")
        assert rows[0].text == rows[1].text
        assert rows[0].news() == rows[1].news()
        assert rows[0].news() == ("", 0, [])
