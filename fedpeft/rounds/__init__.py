"""The round engine: the loop, the cohort, replies, collectors, strategies, downlink and buffered rounds."""
