"""Mutated files for every reader of untrusted files. See benchmarks/hostile/__main__.py."""
