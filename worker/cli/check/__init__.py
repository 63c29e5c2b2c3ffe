"""`vqa-worker check`: check the configuration and every dependency."""
