"""Templates come with checkpoints from anywhere: none may run code, run for ever or fill the memory."""

from __future__ import annotations

import gc
import os
import threading
import time

import pytest

from gemma2_fast.errors import ChatError
from gemma2_fast.text import ChatFormat, Tokenizer
from gemma2_fast.text.template_process import TemplateProcess

MESSAGES = [{"role": "user", "content": "Hello"}]
NESTED_LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
LONG_C_CALL = "{{ 3 ** 400000000 }}"


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ ''|attr('__class__') }}{{ (''|attr('__class__')).mro() }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ lipsum.__globals__['os'].getcwd() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(tokenizer: Tokenizer, template: str) -> None:
    with pytest.raises(ChatError, match="the chat template failed"):
        ChatFormat(template, tokenizer).render(MESSAGES)


@pytest.mark.parametrize("template", ["{% if %}", "{{", "{% for x in %}", "{{ 1 / 0 }}", "{{ messages[7].content }}"])
def test_a_broken_template(tokenizer: Tokenizer, template: str) -> None:
    with pytest.raises(ChatError, match="the chat template failed"):
        ChatFormat(template, tokenizer).render(MESSAGES)


@pytest.mark.parametrize("template", [NESTED_LOOPS, LONG_C_CALL])
def test_an_endless_template_is_stopped(tokenizer: Tokenizer, template: str) -> None:
    chat = ChatFormat(template, tokenizer, time_limit_s=0.3)
    start = time.monotonic()
    with pytest.raises(ChatError, match=r"0\.3 s"):
        chat.render(MESSAGES)
    assert time.monotonic() - start < 10  # the limit, and the start of a process on a busy machine


def test_it_is_stopped_in_any_thread_and_leaves_nothing_running(tokenizer: Tokenizer) -> None:
    process = TemplateProcess(NESTED_LOOPS, time_limit_s=0.5)
    threads_before = threading.active_count()
    errors: list[ChatError] = []

    def render() -> None:
        try:
            process.render({}, max_characters=10)
        except ChatError as error:
            errors.append(error)

    thread = threading.Thread(target=render)
    thread.start()
    while process._child is None:
        time.sleep(0.01)
    pid = process._child.pid
    thread.join(30)
    assert not thread.is_alive()
    assert len(errors) == 1
    assert threading.active_count() == threads_before
    assert not is_running(pid)


def test_a_stopped_template_can_be_tried_again(tokenizer: Tokenizer) -> None:
    template = "{% if messages[0].content == 'loop' %}" + NESTED_LOOPS + "{% endif %}{{ messages[0].content }}"
    chat = ChatFormat(template, tokenizer, time_limit_s=0.5)
    with pytest.raises(ChatError, match="stopped"):
        chat.render([{"role": "user", "content": "loop"}])
    assert chat.render(MESSAGES) == [2, 4521]


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "OutputTooLarge"),
        ("{{ 'a' * 1000000 }}", "OutputTooLarge"),
        ("{{ 'a' * 2 * 10 ** 9 }}", "MemoryError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ range(10 ** 9) | list }}", "OverflowError"),
    ],
)
def test_output_and_memory_are_bounded(tokenizer: Tokenizer, template: str, match: str) -> None:
    with pytest.raises(ChatError, match=match):
        ChatFormat(template, tokenizer).render(MESSAGES)


def test_the_process_serves_many_threads(tokenizer: Tokenizer) -> None:
    chat = ChatFormat("{{ messages[0].content }}", tokenizer)
    results: dict[int, list[int]] = {}

    def render(number: int) -> None:
        for _ in range(5):
            results[number] = chat.render([{"role": "user", "content": f"thread {number}"}])

    threads = [threading.Thread(target=render, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == {number: tokenizer.encode(f"thread {number}") for number in range(8)}


def test_the_process_ends_with_its_format(tokenizer: Tokenizer) -> None:
    process = TemplateProcess("x", time_limit_s=5)
    assert process.render({}, max_characters=1) == "x"
    child = process._child
    assert child is not None
    assert is_running(child.pid)
    pid = child.pid
    del process, child
    gc.collect()
    assert not is_running(pid)


def test_a_process_that_died_is_replaced(tokenizer: Tokenizer) -> None:
    process = TemplateProcess("x", time_limit_s=5)
    process.render({}, max_characters=1)
    assert process._child is not None
    process._child.kill()
    process._child.wait()
    assert process.render({}, max_characters=1) == "x"
    process.close()


def test_secrets_of_the_environment_stay_out(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    process = TemplateProcess("x", time_limit_s=5)
    process.render({}, max_characters=1)
    assert process._child is not None
    with open(f"/proc/{process._child.pid}/environ", "rb") as file:
        assert b"hf_secret" not in file.read()
    process.close()
