"""What is done with an hour on a GPU: check, sanitize, time and tune every kernel, and carry the results home."""
