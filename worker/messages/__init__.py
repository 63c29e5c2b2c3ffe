"""The messages on the wire: jobs and results."""
