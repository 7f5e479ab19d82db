"""Attention: the instrument. Taps on attention calls, layouts of tokens, exact entropy and its backends.

Imports core.
"""
