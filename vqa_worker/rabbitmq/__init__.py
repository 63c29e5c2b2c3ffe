"""RabbitMQ: connections that are made again after losses, confirmed messages, reply queues."""
