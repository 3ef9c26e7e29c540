"""Which settings fit into a device's memory: `python -m examples.llama.plan --help`."""

import sys

if __name__ == "__main__":
    from examples.llama.memory.xla_flags import prefer_memory

    prefer_memory()

from examples.llama.plan.planner import main

if __name__ == "__main__":
    sys.exit(main())
