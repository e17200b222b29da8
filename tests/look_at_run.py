"""What the three verbs that only look say of a run, from a process of its own, as one line of JSON."""

import json
import os
import sys

from jobs import logs, stacks, status

HEAVY = ("torch", "diffusers", "transformers")


def look(run: str) -> None:
    """Print what is said of a run, and which of the libraries that take seconds to load were loaded."""
    told = {
        "status": status.main(status.StatusConfig(run=run)),
        "logs": logs.main(logs.LogsConfig(run=run, role="trainer", errors=True)),
        "stacks": stacks.main(stacks.StacksConfig(run=run)),
        "loaded": [name for name in HEAVY if name in sys.modules],
    }
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    look(sys.argv[1])
    sys.stdout.flush()
    os._exit(0)
