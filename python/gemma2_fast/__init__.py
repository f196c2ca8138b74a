"""Runs Google's Gemma language models as fast as the machine allows."""

from gemma2_fast.generator import Generator
from gemma2_fast.outputs import Chunk, Generation, Timings, TokenLogprob, Usage
from gemma2_fast.sampling import SamplingParams

__version__ = "0.1.0"

__all__ = ["Chunk", "Generation", "Generator", "SamplingParams", "Timings", "TokenLogprob", "Usage", "__version__"]
