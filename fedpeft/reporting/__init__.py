"""What a run tells people and other programs: progress, the final table, metric sinks and the HTML report."""
