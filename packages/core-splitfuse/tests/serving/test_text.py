"""Text comes in whole characters and adds up; stop strings are found in text, not in tokens."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models

from core_splitfuse.serving.text import StopStrings, TextStream
from core_splitfuse.serving.tokens import TokenTable

EMOJI = "👩‍👩‍👧‍👦🏳️‍🌈👍🏽🇩🇪e\u0301日本\ufffd\u200d"
texts = st.text(st.sampled_from(EMOJI) | st.characters(exclude_categories=["Cs"]), max_size=60)


def streamed(stream: TextStream, ids: list[int]) -> list[str]:
    return [*(stream.feed(token) for token in ids), stream.finish()]


@settings(deadline=None)
@given(text=texts)
def test_pieces_are_the_text_that_was_encoded(tokenizer: Any, text: str) -> None:
    backend = tokenizer.backend_tokenizer
    ids = backend.encode(text).ids
    pieces = streamed(TextStream(backend), ids)
    assert "".join(pieces) == backend.decode(ids) == text
    assert not any(0xD800 <= ord(character) < 0xE000 for piece in pieces for character in piece)


@settings(deadline=None, max_examples=200)
@given(
    ids=st.lists(st.integers(0, 511) | st.integers(3, 258), max_size=120),
    prompt=st.lists(st.integers(0, 511), max_size=8),
    keep=st.booleans(),
)
def test_pieces_of_any_tokens_are_what_decoding_all_of_them_gives(
    tokenizer: Any, ids: list[int], prompt: list[int], keep: bool
) -> None:
    backend = tokenizer.backend_tokenizer
    stream = TextStream(backend, prompt, keep_special=keep)
    whole = backend.decode(ids, skip_special_tokens=not keep)
    assert "".join(streamed(stream, ids)) == whole


def test_no_piece_ends_within_a_character(tokenizer: Any) -> None:
    backend = tokenizer.backend_tokenizer
    text = "a 👩‍🚀 b 日本 c"
    pieces = streamed(TextStream(backend), backend.encode(text).ids)
    assert "\ufffd" not in "".join(pieces)
    assert len([piece for piece in pieces if piece]) > 5


def test_bytes_that_are_no_text_are_not_held_back_for_ever(tokenizer: Any) -> None:
    backend = tokenizer.backend_tokenizer
    token = backend.encode("日").ids[1:2]  # a byte that no character begins with
    stream = TextStream(backend)
    given_out = "".join(stream.feed(token[0]) for _ in range(500))
    assert len(given_out) > 400
    assert given_out + stream.finish() == backend.decode(token * 500)


def sentencepiece() -> Tokenizer:
    """A tokenizer that falls back to bytes, and strips the space before the first word."""
    words = ["<unk>", "\u2581the", "\u2581fox", "s", "\u2581", "x", "\u00e9"]
    pieces = [*words, *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return made


@settings(deadline=None, max_examples=200)
@given(ids=st.lists(st.integers(1, 262), max_size=80))
def test_bytes_of_sentencepiece_never_stop_the_stream(ids: list[int]) -> None:
    backend = sentencepiece()
    whole = backend.decode(ids)
    found = "".join(streamed(TextStream(backend), ids))
    if "\ufffd" not in whole:
        assert found == whole
    assert found.replace("\ufffd", "").strip() or not whole.replace("\ufffd", "").strip()


def test_an_answer_keeps_the_space_before_its_first_word() -> None:
    backend = sentencepiece()
    assert "".join(streamed(TextStream(backend, [1]), [2, 3])) == " foxs"
    assert "".join(streamed(TextStream(backend), [2, 3])) == "foxs"


def first_stop(text: str, stops: list[str]) -> int | None:
    """Where the text ends: before the string that is complete first, the longest of those."""
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return min(ends)[1] if ends else None


@given(
    pieces=st.lists(st.text("abé", max_size=4), max_size=12),
    stops=st.lists(st.text("abé", min_size=1, max_size=4), max_size=4),
)
def test_stop_strings_do_not_depend_on_where_pieces_end(
    pieces: list[str], stops: list[str]
) -> None:
    finder, whole = StopStrings(stops), "".join(pieces)
    found = "".join(map(finder.feed, pieces))
    end = first_stop(whole, stops)
    assert finder.found == (end is not None)
    assert found + finder.finish() == whole[:end]


@pytest.mark.parametrize("stop", ["fox jumps", "日本語", "👩‍🚀"])
def test_a_stop_string_over_several_tokens_is_not_given_out(tokenizer: Any, stop: str) -> None:
    backend = tokenizer.backend_tokenizer
    ids = backend.encode(f"one two {stop} three").ids
    stream, finder = TextStream(backend), StopStrings([stop])
    found = "".join(finder.feed(stream.feed(token)) for token in ids)
    assert (found, finder.found) == ("one two ", True)


@given(text=texts)
def test_bytes_of_tokens_put_together_are_the_text(tokenizer: Any, text: str) -> None:
    backend = tokenizer.backend_tokenizer
    table = TokenTable(backend)
    found = b"".join(map(table.bytes_of, backend.encode(text).ids))
    assert found == text.encode()


def test_tokens_have_the_bytes_that_they_stand_for(tokenizer: Any) -> None:
    backend = sentencepiece()
    table = TokenTable(backend)
    assert [table.bytes_of(number) for number in (1, 7 + 0xE2)] == [b" the", b"\xe2"]
    assert TokenTable(tokenizer.backend_tokenizer).text_of(2) == "<|im_end|>"
    assert table.text_of(7 + 0xE2) == "bytes:\\xe2"
    assert TokenTable(tokenizer.backend_tokenizer).bytes_of(10**6) == b""
