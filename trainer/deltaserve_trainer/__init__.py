"""Train adapters for the served base: data check, LoRA and sparse methods, evaluation, and registration by the door."""
