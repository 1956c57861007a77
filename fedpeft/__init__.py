"""Federated parameter-efficient fine-tuning: the data stays where it is, a small update travels."""

__version__ = "0.1.0"
