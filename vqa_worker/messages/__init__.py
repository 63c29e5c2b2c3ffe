"""The bodies of messages: jobs and results."""
