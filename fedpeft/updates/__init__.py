"""Updates as named arrays: how they are packed, and low-rank products."""
