"""Distributed processes, side streams and torch.compile of a step."""
