from __future__ import annotations

import sys

from gemma2_fast.bench import gpu
from gemma2_fast.bench.command import main

sys.exit(main(gpu.__doc__, gpu.add_arguments, gpu.run))
