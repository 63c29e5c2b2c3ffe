"""vqa-worker: questions about images, from a queue to a queue."""

__version__ = "0.1.0"
