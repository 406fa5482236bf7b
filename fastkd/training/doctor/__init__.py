"""Checks of a recipe before training."""
