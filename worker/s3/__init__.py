"""S3: sign requests, read and write objects, translate errors."""
