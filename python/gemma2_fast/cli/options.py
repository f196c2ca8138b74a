"""Options that several commands share, and the keyword arguments they stand for.

An option that was not given is not passed on, so that the model's own defaults hold.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from gemma2_fast.errors import RequestError

Subparsers = argparse._SubParsersAction  # argparse has no public name for it

_HUB = ("revision", "cache_dir", "local_files_only")
_MODEL = ("backend", "dtype", "quantization", "activations", "kv_dtype", "max_seq_len", "max_step_tokens",
          "kv_cache_gib", "num_threads", "sliding_window", "instruction_set", *_HUB)  # fmt: skip
_SAMPLING = ("max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
             "presence_penalty", "frequency_penalty", "logit_bias", "seed", "stop", "stop_token_ids",
             "ignore_eos")  # fmt: skip


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="hub id, local directory, .gguf file, or gemma-3-270m")
    add_flags(parser)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What every command takes."""
    parser.add_argument("--quiet", action="store_true", help="no progress bars, notes or timings")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")


def add_text(parser: argparse.ArgumentParser, what: str) -> None:
    """A text as an argument, in a file or on standard input; read_text finds it."""
    parser.add_argument("text", metavar=what, nargs="?", help="the text; without it standard input is read")
    parser.add_argument("--file", type=Path, metavar="PATH", help="read the text from a file")
    parser.set_defaults(usage_error=parser.error)


def read_text(args: argparse.Namespace) -> str:
    """The text of add_text. The newline that a shell or an editor puts at its end is not part of it."""
    if args.text is not None:
        if args.file is not None:
            args.usage_error("give the text as an argument or with --file, not both")
        return str(args.text)
    if args.file is not None:
        try:
            text = args.file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RequestError(f"{args.file} is not UTF-8 text: {error}") from error
        return str(text).removesuffix("\n")
    if sys.stdin.isatty():
        args.usage_error("no text: give it as an argument, with --file, or on standard input")
    return sys.stdin.read().removesuffix("\n")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    add = _adder(parser.add_argument_group("model"))
    add("--backend", choices=["auto", "cpu", "cuda", "reference"], help="what computes (default: auto)")
    add("--dtype", choices=["auto", "bfloat16", "float32"], help="type of the weights (default: the checkpoint's own)")
    add("--quantization", choices=["int8", "int4"], help="quantise the weights while loading")
    add("--activations", choices=["auto", "float32", "int8"], help="type of the activations in matrix products")
    add("--kv-dtype", choices=["auto", "float32", "bfloat16", "int8"], help="type of the cache (default: as dtype)")
    add("--max-seq-len", type=int, metavar="TOKENS", help="longest prompt and reply together")
    add("--max-step-tokens", type=int, metavar="TOKENS", help="tokens computed in one step; longer prompts are chunked")
    add("--kv-cache-gib", type=float, metavar="GIB", help="most memory for the cache")
    add("--num-threads", type=int, metavar="N", help="threads, this one included")
    add("--sliding-window", type=int, metavar="KEYS", help="another window for the windowed layers")
    add("--instruction-set", choices=["auto", "avx512_vnni", "avx2", "scalar"], help="kernels to use")
    add_hub_options(parser)


def add_hub_options(parser: argparse.ArgumentParser) -> None:
    add = _adder(parser.add_argument_group("hub"))
    add("--revision", help="branch, tag or commit on the hub")
    add("--cache-dir", metavar="DIR", help="where downloads are kept")
    add("--local-files-only", action="store_true", help="never ask the hub")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    add = _adder(parser.add_argument_group("sampling"))
    add("--max-tokens", type=int, metavar="N", help="most new tokens (default: 256)")
    add("--min-tokens", type=int, metavar="N", help="no stop before this many new tokens")
    add("--temperature", type=float, metavar="T", help="0 takes the likeliest token every time")
    add("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens")
    add("--top-p", type=float, metavar="P", help="sample from the likeliest tokens that hold P of the probability")
    add("--min-p", type=float, metavar="P", help="leave out tokens below P times the likeliest")
    add("--repetition-penalty", type=float, metavar="X", help="divide the odds of tokens seen before; 1 is none")
    add("--presence-penalty", type=float, metavar="X", help="subtract from logits of tokens generated before")
    add("--frequency-penalty", type=float, metavar="X", help="the same, once for every time")
    add("--logit-bias", type=_bias, action="append", metavar="ID=X", help="add X to the logit of token ID; repeatable")
    add("--seed", type=int, metavar="N", help="the same seed gives the same tokens")
    add("--stop", action="append", metavar="TEXT", help="end before this text; repeatable")
    add("--stop-token-id", type=int, action="append", dest="stop_token_ids", metavar="ID", help="repeatable")
    add("--ignore-eos", action="store_true", help="go on past the end of text")


def model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of Generator.from_pretrained and Generator.describe."""
    return {**_given(args, _MODEL), "progress": not args.quiet}


def hub_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of resolve_model."""
    return _given(args, _HUB)


def sampling_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of Generator.generate, stream and chat."""
    given = _given(args, _SAMPLING)
    if "logit_bias" in given:
        given["logit_bias"] = dict(given["logit_bias"])
    return given


def _given(args: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def _adder(group: argparse._ArgumentGroup) -> Any:
    def add(*flags: str, **settings: Any) -> None:
        group.add_argument(*flags, default=argparse.SUPPRESS, **settings)

    return add


def _bias(text: str) -> tuple[int, float]:
    token_id, _, bias = text.partition("=")
    try:
        return int(token_id), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected ID=X such as 42=-1.5, got {text!r}") from None
