from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from gemma2_fast.cli import main
from gemma2_fast.errors import HubError, WeightsError
from tests.cli.fake_generator import FakeGenerator

Capture = pytest.CaptureFixture[str]


def test_text_on_stdout_and_timings_on_stderr(fake: FakeGenerator, capsys: Capture) -> None:
    assert main(["generate", "some/model", "Why?"]) == 0
    out, err = capsys.readouterr()
    assert out == "The sky is blue.\n"
    # 5 tokens in 50 ms are 100 a second; the 3 tokens after the first in 300 ms are 10.
    assert "prompt 5 tokens in 0.05 s, 100.0 tokens/s" in err
    assert "reply 4 tokens in 0.30 s, 10.0 tokens/s" in err
    assert fake.model == "some/model"
    assert fake.prompts == ["Why?"]
    assert fake.closed
    assert fake.streams[0].closed


def test_quiet_prints_text_only(fake: FakeGenerator, capsys: Capture) -> None:
    assert main(["generate", "m", "Why?", "--quiet"]) == 0
    assert capsys.readouterr() == ("The sky is blue.\n", "")
    assert fake.options["progress"] is False


def test_options_not_given_are_not_passed(fake: FakeGenerator) -> None:
    main(["generate", "m", "Why?"])
    assert fake.options == {"max_batch_size": 1, "progress": True}


def test_every_option_reaches_the_generator(fake: FakeGenerator) -> None:
    sampling = (
        "--max-tokens 7 --min-tokens 2 --temperature 0.5 --top-k 3 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.1 "
        "--presence-penalty 0.2 --frequency-penalty 0.3 --logit-bias 4=-1.5 --logit-bias 5=2 --seed 6 --stop a "
        "--stop b --stop-token-id 8 --stop-token-id 9 --ignore-eos"
    )
    model = (
        "--backend cpu --dtype float32 --quantization int8 --activations float32 --kv-dtype bfloat16 --max-seq-len 100 "
        "--max-step-tokens 32 --kv-cache-gib 0.5 --num-threads 2 --sliding-window 64 --instruction-set scalar "
        "--revision main --cache-dir c --local-files-only"
    )
    assert main(["generate", "m", "Why?", *sampling.split(), *model.split()]) == 0
    params = fake.params
    assert params is not None
    assert (params.max_tokens, params.min_tokens, params.temperature, params.top_k) == (7, 2, 0.5, 3)
    assert (params.top_p, params.min_p, params.repetition_penalty) == (0.9, 0.1, 1.1)
    assert (params.presence_penalty, params.frequency_penalty, params.seed) == (0.2, 0.3, 6)
    assert params.logit_bias == {4: -1.5, 5: 2.0}
    assert params.stop == ("a", "b")
    assert params.stop_token_ids == (8, 9)
    assert params.ignore_eos
    assert fake.options == {
        "backend": "cpu",
        "dtype": "float32",
        "quantization": "int8",
        "activations": "float32",
        "kv_dtype": "bfloat16",
        "max_seq_len": 100,
        "max_step_tokens": 32,
        "kv_cache_gib": 0.5,
        "num_threads": 2,
        "sliding_window": 64,
        "instruction_set": "scalar",
        "revision": "main",
        "cache_dir": "c",
        "local_files_only": True,
        "max_batch_size": 1,
        "progress": True,
    }


def test_prompt_may_stand_after_options(fake: FakeGenerator) -> None:
    assert main(["generate", "m", "--max-tokens", "5", "Why?"]) == 0
    assert fake.prompts == ["Why?"]


def test_prompt_from_file_loses_its_last_newline(fake: FakeGenerator, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text("two\nlines \n", encoding="utf-8")
    assert main(["generate", "m", "--file", str(tmp_path / "prompt")]) == 0
    assert fake.prompts == ["two\nlines "]


def test_prompt_from_stdin(fake: FakeGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("piped\n"))
    assert main(["generate", "m"]) == 0
    assert fake.prompts == ["piped"]


def test_json_is_one_object(fake: FakeGenerator, capsys: Capture) -> None:
    assert main(["generate", "m", "Why?", "--json", "--quiet", "--logprobs", "2"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["text"] == "reply 0"
    assert record["token_ids"] == [10, 11, 12, 13]
    assert record["usage"] == {"prompt_tokens": 5, "completion_tokens": 4}
    assert fake.params is not None
    assert fake.params.logprobs == 2


def test_several_continuations(fake: FakeGenerator, capsys: Capture) -> None:
    assert main(["generate", "m", "Why?", "-n", "3"]) == 0
    assert capsys.readouterr().out == "reply 0\n\nreply 1\n\nreply 2\n"
    assert fake.options["max_batch_size"] == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "required: COMMAND"),
        (["generate"], "required: MODEL"),
        (["generate", "m", "a", "b"], "unrecognized arguments: b"),
        (["generate", "m", "a", "--tempreature", "1"], "unrecognized arguments: --tempreature 1"),
        (["generate", "m", "a", "--file", "b"], "not both"),
        (["generate", "m", "a", "--logit-bias", "4"], "expected ID=X such as 42=-1.5, got '4'"),
        (["generate", "m", "a", "--logprobs", "1"], "need --json"),
        (["generate", "m", "a", "--backend", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_wrong_usage_exits_with_2(fake: FakeGenerator, capsys: Capture, arguments: list[str], says: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


def test_no_prompt_on_a_terminal_is_wrong_usage(fake: FakeGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    with pytest.raises(SystemExit) as stop:
        main(["generate", "m"])
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (HubError("no such model"), "gemma2-fast: error: no such model\n"),
        (WeightsError("missing:\n  a\n  b"), "gemma2-fast: error: missing: a b\n"),
        (FileNotFoundError(2, "No such file", "x.gguf"), "gemma2-fast: error: [Errno 2] No such file: 'x.gguf'\n"),
        (KeyError("oops"), "gemma2-fast: error: KeyError: 'oops' (--traceback shows where)\n"),
    ],
)
def test_error_is_one_line_and_exit_code_1(fake: FakeGenerator, capsys: Capture, error: Exception, line: str) -> None:
    fake.load_error = error
    assert main(["generate", "m", "Why?"]) == 1
    assert capsys.readouterr() == ("", line)


def test_traceback_on_request(fake: FakeGenerator) -> None:
    fake.load_error = HubError("no such model")
    with pytest.raises(HubError):
        main(["generate", "m", "Why?", "--traceback"])


def test_wrong_sampling_value_is_found_before_loading(fake: FakeGenerator, capsys: Capture) -> None:
    assert main(["generate", "m", "Why?", "--temperature", "-1"]) == 1
    assert "temperature must be at least 0, got -1.0" in capsys.readouterr().err
    assert fake.model is None


def test_file_that_is_not_text(fake: FakeGenerator, capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_bytes(b"\xff\xfe")
    assert main(["generate", "m", "--file", str(tmp_path / "prompt")]) == 1
    assert "is not UTF-8 text" in capsys.readouterr().err


def test_interrupt_cancels_and_exits_with_130(fake: FakeGenerator, capsys: Capture) -> None:
    fake.interrupt_after = 2
    assert main(["generate", "m", "Why?"]) == 130
    assert capsys.readouterr().out == "The sky "
    assert fake.streams[0].closed
    assert fake.closed
