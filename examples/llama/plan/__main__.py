"""Which settings fit into a device's memory: `python -m examples.llama.plan --help`."""

import os
import sys

if __name__ == "__main__":
    from examples.llama.memory.xla_flags import MEMORY_FLAGS

    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {MEMORY_FLAGS}".strip()

from examples.llama.plan.planner import main

if __name__ == "__main__":
    sys.exit(main())
