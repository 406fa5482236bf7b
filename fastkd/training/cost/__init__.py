"""What a method costs: seconds of a step and peak memory."""
