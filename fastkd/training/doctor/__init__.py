"""What would spoil a run, before it begins."""
