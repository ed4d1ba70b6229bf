"""Hosts that draw many completions of many prompts."""
