"""The command line: `gemma2-fast generate · chat · info · tokenize`."""

from gemma2_fast.cli.entry import main

__all__ = ["main"]
