"""The command line: `gemma2-fast generate · chat · info · tokenize · quantize · bench`."""

from gemma2_fast.cli.entry import main

__all__ = ["main"]
