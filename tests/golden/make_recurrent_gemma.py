"""Makes recurrent_gemma.npz with DeepMind's PyTorch code, or checks that it would come out the same.

In an environment of its own, because the package pins old versions:
    pip install torch==2.13.0 numpy einops jaxtyping sentencepiece && pip install --no-deps recurrentgemma==1.0.1
    python -m tests.golden.make_recurrent_gemma [--check]        # from the root of the repository

Kept are float64 logits, the distance of a float32 run from them, and the tokens that a float32 run generates with
DeepMind's cache, with how far the best two logits of each are apart at least. For float64 the casts to float32 inside
softmax and recurrence are left out.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from tests.golden import griffin_model as model

# The package's own beginning asks for JAX and Flax, which its PyTorch half does not use.
found = find_spec("recurrentgemma")
if found is None:
    sys.exit(f"This interpreter has no package recurrentgemma; install it as {__file__} says.")
package = ModuleType("recurrentgemma")
package.__path__ = list(found.submodule_search_locations)
sys.modules["recurrentgemma"] = package
from recurrentgemma import common  # noqa: E402
from recurrentgemma.torch import griffin as deepmind  # noqa: E402

FILE = Path(__file__).with_name("recurrent_gemma.npz")


class KeepFloat64(TorchFunctionMode):
    """Casts of float64 tensors to float32 do nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.type and args[0].dtype == torch.float64 and args[1:] == (torch.float32,):
            return args[0]
        return func(*args, **(kwargs or {}))


def griffin(dtype: torch.dtype) -> Any:
    kinds = {"R": common.TemporalBlockType.RECURRENT, "A": common.TemporalBlockType.ATTENTION}
    config = common.GriffinConfig(
        vocab_size=model.VOCAB_SIZE,
        width=model.WIDTH,
        mlp_expanded_width=model.MLP_WIDTH,
        num_heads=model.NUM_HEADS,
        block_types=tuple(kinds[kind] for kind in model.PATTERN),
        embeddings_scale_by_sqrt_dim=True,
        attention_window_size=model.WINDOW,
        logits_soft_cap=model.SOFT_CAP,
        lru_width=model.LRU_WIDTH,
    )
    made = deepmind.Griffin(config, gradient_checkpointing=False, dtype=dtype)
    made.load_state_dict({name: torch.tensor(values, dtype=dtype) for name, values in model.weights().items()})
    return made.eval()


def logits(made: Any, rows: list[np.ndarray], positions: list[np.ndarray]) -> np.ndarray:
    """[batch, T, V] of one call without a cache."""
    ids, at = (torch.tensor(np.stack(values)) for values in (rows, positions))
    out, _ = made(ids, at)
    return np.asarray(out.numpy())


def generated(made: Any, rows: list[np.ndarray], positions: list[np.ndarray]) -> np.ndarray:
    """Greedy tokens [batch, N]: the prompts in one call, then one token a call, as DeepMind's sampler does."""
    at = torch.tensor(np.stack(positions))
    out, cache = made(torch.tensor(np.stack(rows)), at)
    new = [out[:, -1:].argmax(-1)]
    while len(new) < model.NEW_TOKENS:
        at = at[:, -1:] + 1
        out, cache = made(new[-1], at, cache)
        new.append(out.argmax(-1))
    return np.asarray(torch.cat(new, 1).numpy())


def smallest_gap(exact: np.ndarray) -> np.ndarray:
    """Between the best logit of a row and the next one."""
    second, best = np.moveaxis(np.sort(exact)[..., -2:], -1, 0)
    return np.asarray((best - second).min())


def golden() -> dict[str, np.ndarray]:
    ids = model.tokens()
    short, long = ids["short"], ids["long"]
    packed = np.concatenate([ids["first"], ids["second"]])
    restarts = np.concatenate([np.arange(length) for length in model.DOCUMENTS])
    cases = {
        "short": ([short], [np.arange(len(short))]),
        "long": ([long], [np.arange(len(long))]),
        "packed": ([packed], [restarts]),
        "batch": ([long[: model.SHORT], short], [np.arange(model.SHORT)] * 2),
    }
    kept = {}
    with torch.no_grad():
        exact_model, plain_model = griffin(torch.float64), griffin(torch.float32)

        def both(rows: list[np.ndarray], positions: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
            with KeepFloat64():
                exact = logits(exact_model, rows, positions)
            return exact, np.abs(logits(plain_model, rows, positions) - exact).max()

        for name, (rows, positions) in cases.items():
            exact, kept[f"{name}_float32_error"] = both(rows, positions)
            kept[name] = exact[:, model.ROWS[name]]
        for name in model.GENERATED:
            rows, positions = cases[name]
            new = generated(plain_model, rows, positions)
            whole = np.concatenate([np.stack(rows), new[:, :-1]], 1)
            exact, kept[f"{name}_generated_float32_error"] = both(list(whole), [np.arange(whole.shape[1])] * len(rows))
            kept[f"{name}_generated"] = new.astype(np.int16)
            kept[f"{name}_smallest_gap"] = smallest_gap(exact[:, -model.NEW_TOKENS :])
    return kept


def main() -> None:
    made = golden()
    if "--check" in sys.argv[1:]:
        with np.load(FILE) as stored:
            assert set(stored) == set(made), (set(stored), set(made))
            for name, values in made.items():
                np.testing.assert_allclose(stored[name], values, rtol=1e-9 if values.ndim > 1 else 0.5, err_msg=name)
            for name in model.GENERATED:
                assert np.array_equal(stored[f"{name}_generated"], made[f"{name}_generated"])
        print(f"{FILE} is what DeepMind's code gives")
    else:
        np.savez_compressed(FILE, **made)
        print(f"{FILE}: {FILE.stat().st_size} bytes")
        for name in model.GENERATED:
            gap, error = made[f"{name}_smallest_gap"], made[f"{name}_generated_float32_error"]
            print(f"{name}: the best two logits of a token are at least {gap:.1e} apart, float32 errs by {error:.1e}")


if __name__ == "__main__":
    main()
