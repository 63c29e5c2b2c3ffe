"""Who may do what at RabbitMQ: as files that `python -m deploy.rabbitmq` writes."""
