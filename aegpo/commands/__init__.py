"""Commands: one module for each command of `aegpo`, and the command line itself.

May import every room but testing.
"""
