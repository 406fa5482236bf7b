"""GPU kernels: resources, traffic, launches, predictions."""
