"""A small model run through the public face on a GPU, for compute-sanitizer to watch. Imports no torch.

compute-sanitizer --tool memcheck python -m tests.gpu.memcheck_case
"""

from __future__ import annotations

import sys

import numpy as np

from tests.support.checkpoints import generator, quantisable_spec, random_weights

PROMPTS = ([2], [2, *range(3, 80)], [2, *range(3, 14)])  # the window is 40 keys, a page 64


def main() -> None:
    spec = quantisable_spec("gemma2", head_dim=128)
    options = {"backend": "cuda", "max_seq_len": 128, "max_step_tokens": 64}
    with generator(spec, random_weights(spec, "BF16"), **options) as made:
        logits = made.logits(PROMPTS[1])
        greedy = made.generate(PROMPTS, max_tokens=6, ignore_eos=True)
        drawn = made.generate(PROMPTS, max_tokens=3, ignore_eos=True, temperature=1.0, top_k=5, seed=1)
    assert np.isfinite(logits).all()
    assert [len(made.token_ids) for made in (*greedy, *drawn)] == [6, 6, 6, 3, 3, 3]
    assert "torch" not in sys.modules
    print(f"{len(logits)} rows of logits and {sum(len(made.token_ids) for made in (*greedy, *drawn))} tokens")


if __name__ == "__main__":
    main()
