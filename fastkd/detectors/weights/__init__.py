"""Weight files: our own, torchvision's and detectron2's."""
