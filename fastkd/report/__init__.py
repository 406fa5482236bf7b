"""The HTML report about training runs: numbers, curves, cost, pictures of what the networks see and get wrong."""

from fastkd.report.write import write_report

__all__ = ["write_report"]
