"""What agents and people call: the servicer, TLS, rate limits, ingest of results, blobs, sessions."""
