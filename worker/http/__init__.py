"""The HTTP client sessions that the S3 and model clients share."""
