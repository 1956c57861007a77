"""From files to token rows that clients hold: readers, templates, labels, partitioners, encoding, batches."""
