"""HTTP: translates requests into what the engine and the door understand, and their answers back."""
