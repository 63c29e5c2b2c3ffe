"""The result store: answers kept in S3 so that no job is billed twice."""
