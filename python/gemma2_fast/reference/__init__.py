"""The pure-PyTorch reference: what every op means, and what every kernel is judged by. Slow, and plain on purpose."""

from gemma2_fast.errors import BackendError

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise BackendError(
        'backend="reference" needs PyTorch, which is not installed; install it with: pip install "gemma2-fast[torch]"'
    ) from error

from gemma2_fast.reference.backend import ReferenceStep
from gemma2_fast.reference.batch import flat_batch
from gemma2_fast.reference.cache import Cache, ContiguousCache, PagedCache
from gemma2_fast.reference.dtypes import DTYPES
from gemma2_fast.reference.model import ReferenceModel

__all__ = ["DTYPES", "Cache", "ContiguousCache", "PagedCache", "ReferenceModel", "ReferenceStep", "flat_batch"]
