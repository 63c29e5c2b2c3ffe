"""A simulator of a multimodal model behind an OpenAI-compatible API.

It is not a model, and says so in every answer. It decodes every image that reaches it and answers from the
decoded pixels, so that a lost, truncated or swapped image shows in the answer; and it fails on request in
every way in which real APIs were seen to fail.
"""
