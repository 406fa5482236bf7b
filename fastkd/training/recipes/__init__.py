"""The named recipes."""
