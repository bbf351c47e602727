"""What clients may send. Strict: no coercion, no unknown fields, bounded lists, no NaN."""
