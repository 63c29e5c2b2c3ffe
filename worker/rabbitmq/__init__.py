"""RabbitMQ: deliveries in, confirmed messages out."""
