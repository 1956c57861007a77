"""Updates and states as bytes."""
