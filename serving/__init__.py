"""Serving: an OpenAI-compatible server, the vLLM plugin and the demo page."""
