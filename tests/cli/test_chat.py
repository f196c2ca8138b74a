from __future__ import annotations

import io
from collections.abc import Callable

import pytest

from gemma2_fast.cli import main
from gemma2_fast.errors import RequestError
from tests.cli.fake_generator import FakeGenerator

Capture = pytest.CaptureFixture[str]
Say = Callable[..., None]
REPLY = "The sky is blue."


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Say:
    """Lines for standard input; an exception among them is raised by input() in its turn."""

    def prepare(*lines: str | BaseException, terminal: bool = False) -> None:
        remaining = iter(lines)

        def read(prompt: str = "") -> str:
            line = next(remaining, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr("sys.stdin", io.StringIO())
        monkeypatch.setattr("sys.stdin.isatty", lambda: terminal)

    return prepare


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_second_turn_holds_the_first(fake: FakeGenerator, say: Say, capsys: Capture) -> None:
    say("Hi", "And then?")
    assert main(["chat", "m", "--system", "Be brief.", "--seed", "3"]) == 0
    first = [turn("system", "Be brief."), turn("user", "Hi")]
    assert fake.conversations == [first, [*first, turn("assistant", REPLY), turn("user", "And then?")]]
    assert capsys.readouterr().out == f"{REPLY}\n{REPLY}\n"
    assert fake.params is not None
    assert fake.params.seed == 3
    assert fake.closed


def test_reset_keeps_the_system_message_only(fake: FakeGenerator, say: Say) -> None:
    say("Hi", "/reset", "Hello")
    assert main(["chat", "m", "--system", "Be brief."]) == 0
    assert fake.conversations[1] == [turn("system", "Be brief."), turn("user", "Hello")]


def test_commands(fake: FakeGenerator, say: Say, capsys: Capture) -> None:
    say("Hi", "/history", "/help", "/nonsense", "/exit", "never read")
    assert main(["chat", "m", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert f"user: Hi\nassistant: {REPLY}\n" in out
    assert "/reset" in out
    assert err == "/nonsense: no such command; /help lists them\n"
    assert len(fake.conversations) == 1


def test_interrupt_stops_the_reply_and_not_the_program(fake: FakeGenerator, say: Say, capsys: Capture) -> None:
    fake.interrupt_after = 2
    say("Hi", "Go on", "/exit", terminal=True)
    assert main(["chat", "m"]) == 0
    assert fake.streams[0].closed
    assert fake.conversations[1] == [turn("user", "Hi"), turn("assistant", "The sky "), turn("user", "Go on")]
    assert "(stopped)" in capsys.readouterr().err


def test_interrupt_before_the_first_word_takes_the_turn_back(fake: FakeGenerator, say: Say) -> None:
    fake.interrupt_after = 0
    say("Hi", "Again")
    assert main(["chat", "m"]) == 0
    assert fake.conversations[1] == [turn("user", "Again")]


def test_interrupt_at_the_prompt_goes_on(fake: FakeGenerator, say: Say) -> None:
    say(KeyboardInterrupt(), "Hi", terminal=True)
    assert main(["chat", "m"]) == 0
    assert fake.conversations == [[turn("user", "Hi")]]


def test_refused_turn_is_taken_back(fake: FakeGenerator, say: Say, capsys: Capture) -> None:
    fake.interrupt_after, fake.error = 0, RequestError("the conversation is longer than the context")
    say("Hi", "Again")
    assert main(["chat", "m"]) == 0
    assert fake.conversations[1] == [turn("user", "Again")]
    assert "gemma2-fast: error: the conversation is longer than the context" in capsys.readouterr().err


def test_empty_lines_are_no_turns(fake: FakeGenerator, say: Say) -> None:
    say("", "   ", "Hi")
    assert main(["chat", "m"]) == 0
    assert fake.conversations == [[turn("user", "Hi")]]
