"""Parts shared by several detectors: heads, assignments, samplers."""
