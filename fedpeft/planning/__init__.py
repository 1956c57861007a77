"""What a run would cost and why it would be refused, worked out without training."""
