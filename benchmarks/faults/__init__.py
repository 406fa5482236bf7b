"""The fault campaign: kills, full disks, damaged files. See benchmarks/faults/__main__.py."""
