"""Serving: the vLLM plugin and the demo page."""
