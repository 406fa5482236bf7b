"""Cost of a method: seconds per step and peak memory."""
