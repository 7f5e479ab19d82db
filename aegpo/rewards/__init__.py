"""Scorers of images against prompts, one module each."""
