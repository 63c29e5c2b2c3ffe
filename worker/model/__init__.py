"""The client of the OpenAI-compatible model API."""
