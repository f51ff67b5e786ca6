"""onestage: the core of five one-stage instance segmentation papers."""

__version__ = "0.1.0"
