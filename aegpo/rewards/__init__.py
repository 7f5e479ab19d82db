"""Rewards: scorers of images against prompts, one module each, their weights, and servers that score elsewhere.

Imports models, prompts and core; specs import no torch.
"""
