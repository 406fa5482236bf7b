"""Weight files of fastkd, torchvision and detectron2."""
