"""The GPU code: resources, traffic, launches, predictions."""
