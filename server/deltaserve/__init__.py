"""deltaserve: one frozen base language model, thousands of its fine-tunes, one batch."""

__version__ = "0.1.0"
