"""Images: where a job says they are, and what the API is given for them."""
