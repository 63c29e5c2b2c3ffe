"""Decisions about retries, concurrency and outages."""
