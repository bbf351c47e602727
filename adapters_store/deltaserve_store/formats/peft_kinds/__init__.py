"""PEFT types other than LoRA and SHiRA whose delta is exactly a term that the server runs. One reader a type."""
