"""Embedding for many at once: requests in batches, models in memory. Knows nothing of servers."""
