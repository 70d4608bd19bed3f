"""What is done with an hour of a lent GPU: check, sanitize, time and tune every kernel, and carry the results home."""
