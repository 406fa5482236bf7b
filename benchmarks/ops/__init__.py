"""The ops against plain torch."""
