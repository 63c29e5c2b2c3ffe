"""Objects in S3: addressed, signed, read, and its refusals sorted by whose fault they are."""
