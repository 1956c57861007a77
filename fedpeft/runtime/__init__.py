"""What any process needs: files, frames, cancellation, crash points, randomness, telemetry."""
