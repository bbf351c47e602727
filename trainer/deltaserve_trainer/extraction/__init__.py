"""A full fine-tune as an adapter of a chosen size."""
