"""`python -m tests.crash --rounds 200`: kills servers and workers under load and prints what was lost."""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.crash.rounds import leave_no_process, run_rounds


def main() -> int:
    """Run the rounds; 0 when nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="focale-crash-") as folder:
        outputs = Path(folder) / "outputs"
        outputs.mkdir()
        try:
            tally = run_rounds(outputs, arguments.rounds, arguments.seed)
        finally:
            leave_no_process()
    print(
        f"rounds {tally.rounds}, server kills {tally.server_kills}, worker kills {tally.worker_kills}, "
        f"tasks {len(tally.acknowledged)}, states {tally.statuses}, lost {len(tally.lost)}, "
        f"unfinished {len(tally.unfinished)}, doubled {len(tally.doubled)}, faults {len(tally.faults)}"
    )
    for fault in [*tally.lost, *tally.unfinished, *tally.doubled, *tally.faults][:20]:
        print(" ", fault)
    return 0 if tally.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
