"""Plugin: the manager of plugins, and the table of contents of what is in the box.

Imports every room that has parts.
"""
