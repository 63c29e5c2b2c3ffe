"""A stand-in for a multimodal model behind an OpenAI-compatible API.

It is no model and says so in every answer. What it does do honestly: it decodes every picture that reaches it
and answers from the decoded pixels, so that a picture that got lost, cut or swapped on the way shows in the
answer; and it fails on request in every way that a real API was seen to fail.
"""
