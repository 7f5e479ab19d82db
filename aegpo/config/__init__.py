"""Config: YAML with the place of every key, validation, and one frozen experiment for each arm and seed.

Imports method and the rooms above it.
"""
