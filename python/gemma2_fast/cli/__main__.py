import sys

from gemma2_fast.cli import main

sys.exit(main())
