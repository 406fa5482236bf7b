"""Whole training steps against plain torch."""
