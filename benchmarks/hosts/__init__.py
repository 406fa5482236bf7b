"""Distillation in other training frameworks; see __main__.py."""
