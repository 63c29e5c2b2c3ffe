"""`vqa-worker dlq`: looks into the dead-letter queue, puts letters back as jobs, or throws them away."""
