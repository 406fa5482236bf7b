"""Backbones and their weights' names."""
