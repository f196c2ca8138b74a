"""A stream of pushes equals the decoding of all ids, and shows nothing too early."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from gemma2_fast.errors import RequestError
from gemma2_fast.text import StreamDetokenizer, Tokenizer
from tests.text.vocabulary_files import FIRST_BYTE_ID

any_ids = st.lists(
    st.one_of(
        st.integers(0, 255999),
        st.integers(FIRST_BYTE_ID, FIRST_BYTE_ID + 255),
        st.sampled_from([0, 1, 2, 3, 106, 107, 108, 139, 235248]),
    ),
    max_size=40,
)


def pushes(tokenizer: Tokenizer, ids: Sequence[int], stop: Sequence[str] = ()) -> tuple[list[str], str | None]:
    stream = StreamDetokenizer(tokenizer, stop)
    return [*(stream.push(token_id) for token_id in ids), stream.finish()], stream.stopped


def byte_ids(data: bytes) -> list[int]:
    return [FIRST_BYTE_ID + byte for byte in data]


def test_text_comes_at_once(tokenizer: Tokenizer) -> None:
    assert pushes(tokenizer, [4521, 2134]) == (["Hello", " world", ""], None)


def test_a_character_is_held_until_it_is_whole(tokenizer: Tokenizer) -> None:
    assert pushes(tokenizer, byte_ids("🦙".encode())) == (["", "", "", "🦙", ""], None)


def test_bytes_that_are_no_character_come_when_that_is_certain(tokenizer: Tokenizer) -> None:
    assert pushes(tokenizer, [*byte_ids(b"\xe2\x82"), 4521]) == (["", "", "��Hello", ""], None)
    assert pushes(tokenizer, byte_ids(b"\xe2\x82")) == (["", "", "��"], None)


def test_a_stop_string_across_tokens_never_shows(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_content("One. STOP two")
    texts, stopped = pushes(tokenizer, ids, ["STOP t"])
    assert "".join(texts) == "One. "
    assert stopped == "STOP t"
    assert all("S" not in text for text in texts)


def test_what_was_held_comes_when_it_was_no_stop(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_content("<a<ab<abc")
    texts, stopped = pushes(tokenizer, ids, ["<abcd"])
    assert ("".join(texts), stopped) == ("<a<ab<abc", None)
    assert texts[-1] == "<abc"


def test_nothing_comes_after_the_stop(tokenizer: Tokenizer) -> None:
    stream = StreamDetokenizer(tokenizer, ["\n"])
    assert stream.push(4521) == "Hello"
    assert stream.stopped is None
    assert stream.push(108) == ""
    assert stream.stopped == "\n"
    assert stream.push(2134) == ""
    assert stream.finish() == ""


@pytest.mark.parametrize(
    ("stop", "text", "stopped"),
    [
        (["lo", "ell"], "H", "ell"),  # the first to be complete
        (["llo", "ello"], "H", "ello"),  # both complete at "o": the longest
        (["Hell no", "help"], "Hello", None),
    ],
)
def test_which_of_several(tokenizer: Tokenizer, stop: list[str], text: str, stopped: str | None) -> None:
    texts, found = pushes(tokenizer, [4521], stop)
    assert ("".join(texts), found) == (text, stopped)


def test_control_ids_are_silent_and_part_characters(tokenizer: Tokenizer) -> None:
    assert pushes(tokenizer, [2, 4521, 107])[0] == ["", "Hello", "", ""]
    euro = byte_ids("€".encode())
    ids = [*euro[:2], 1, euro[2]]
    assert "".join(pushes(tokenizer, ids)[0]) == tokenizer.decode(ids) == "���"


def test_control_ids_can_be_shown(tokenizer: Tokenizer) -> None:
    stream = StreamDetokenizer(tokenizer, skip_control=False)
    assert stream.push(107) == "<end_of_turn>"


@settings(max_examples=500, deadline=None, derandomize=True)
@given(ids=any_ids)
@example(ids=byte_ids(b"\xf0\x9f\xf0\x9f\xa6\x99\xf0"))
def test_stream_equals_decode(tokenizer: Tokenizer, ids: list[int]) -> None:
    texts, _ = pushes(tokenizer, ids)
    whole = tokenizer.decode(ids)
    assert "".join(texts) == whole
    assert "".join(texts).count("�") == whole.count("�")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.text(max_size=40))
def test_no_replacement_character_for_real_text(tokenizer: Tokenizer, text: str) -> None:
    texts, _ = pushes(tokenizer, byte_ids(text.encode()))
    assert "".join(texts) == text
    assert sum(part.count("�") for part in texts) == text.count("�")


@settings(max_examples=500, deadline=None, derandomize=True)
@given(ids=any_ids.map(lambda ids: [token_id for token_id in ids if token_id not in (4, 5, 6, 106, 107)]))
def test_decode_equals_sentencepiece(tokenizer: Tokenizer, oracle: SentencePieceProcessor, ids: list[int]) -> None:
    assert tokenizer.decode(ids) == oracle.decode(ids)


def until_stop(text: str, stop: Sequence[str]) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=800, deadline=None, derandomize=True)
@given(
    text=st.text("a€", max_size=30),
    stop=st.lists(st.text("a€", min_size=2, max_size=9), min_size=1, max_size=3),
    whole_bytes=st.booleans(),
)
@example(text="aaab", stop=["aab"], whole_bytes=False)
@example(text="aabaabaaab", stop=["aabaaa"], whole_bytes=True)
@example(text="aabaaabaaaa", stop=["aabaaaa"], whole_bytes=False)
def test_stops_in_text_of_few_letters(tokenizer: Tokenizer, text: str, stop: list[str], whole_bytes: bool) -> None:
    ids = byte_ids(text.encode()) if whole_bytes else tokenizer.encode_content(text)
    expected, expected_stop = until_stop(text, stop)
    stream = StreamDetokenizer(tokenizer, stop)
    shown = ""
    for token_id in ids:
        shown += stream.push(token_id)
        assert expected.startswith(shown)
    shown += stream.finish()
    assert (shown, stream.stopped) == (expected, expected_stop)


@pytest.mark.parametrize("stop", [[""], ["a", ""], "abc", [3]])
def test_stop_strings_that_are_refused(tokenizer: Tokenizer, stop: Sequence[str]) -> None:
    with pytest.raises(RequestError):
        StreamDetokenizer(tokenizer, stop)


def test_an_id_out_of_range(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="256000"):
        StreamDetokenizer(tokenizer).push(256000)


def test_the_cost_of_a_token_does_not_grow(tokenizer: Tokenizer) -> None:
    """A stop string that could begin anywhere, and a long text: quadratic work would take minutes."""
    stream = StreamDetokenizer(tokenizer, ["a" * 20_000 + "b"])
    start = time.perf_counter()
    for _ in range(60_000):
        stream.push(235250)  # "a"
    assert time.perf_counter() - start < 20
    assert len(stream.finish()) == 20_000
