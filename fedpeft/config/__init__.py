"""What a run file says: its sections, reading, overrides, and the digest that names the run."""
