"""Files and console output of a run: run directory, checkpoints, logs."""
