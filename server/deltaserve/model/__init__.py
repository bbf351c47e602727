"""The base model: transformers' architectures, our attention, adapters on every linear."""
