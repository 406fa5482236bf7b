"""Backbones and the mapping of weight names."""
