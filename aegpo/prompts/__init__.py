"""Prompts: where they come from, in which order they are asked, and what the Hugging Face hub refuses.

Imports core.
"""
