"""`vqa-worker dlq`: list, show, replay and purge the messages of the dead-letter queue."""
