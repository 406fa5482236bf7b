"""The run on disk and on the console: its folder, checkpoints, logs."""
