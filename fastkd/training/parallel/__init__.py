"""Processes, side streams and compiled regions of a step."""
