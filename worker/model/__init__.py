"""The multimodal model behind an OpenAI-compatible API."""
