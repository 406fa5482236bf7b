"""What several detectors share: heads' parts, assignments, samplers."""
