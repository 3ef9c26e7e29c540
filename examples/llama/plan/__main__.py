"""Search for settings that fit into a device's memory: `python -m examples.llama.plan --help`."""

import sys

if __name__ == "__main__":
    from examples.llama.memory.xla_flags import MEMORY_FLAGS, add_flags

    add_flags(MEMORY_FLAGS)

from examples.llama.plan.planner import main

if __name__ == "__main__":
    sys.exit(main())
