"""`fastkd train` in a process that is killed once: killed_worker.py MARKER and the arguments of fastkd.

Process 1 of the first attempt sends itself SIGKILL in the middle of its fourth step.
"""

import os
import signal
import sys
from pathlib import Path

from fastkd import cli
from fastkd.training import trainer


def main():
    marker, arguments = Path(sys.argv[1]), sys.argv[2:]
    attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
    (marker / f"attempt-{attempt}-{rank}").touch()
    check = trainer.Trainer._check

    def killed(self, *args):
        if (attempt, rank, self.step) == ("0", "1", 3):
            os.kill(os.getpid(), signal.SIGKILL)
        return check(self, *args)

    trainer.Trainer._check = killed
    code = cli.main(arguments)
    if attempt == "1" and code == 0:  # the same run without a disturbance
        code = cli.main([*arguments, "--run-dir", str(marker / "whole")])
    raise SystemExit(code)


if __name__ == "__main__":
    main()
