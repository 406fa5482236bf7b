"""Does distillation help inside of other people's training code? See __main__.py."""
