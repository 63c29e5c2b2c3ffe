"""`vqa-worker top`: live queue figures from RabbitMQ and metrics of the workers."""
