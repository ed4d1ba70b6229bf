"""Adapters in stock vLLM: a plugin that vLLM finds by its entry point; nothing here is imported by the library."""
