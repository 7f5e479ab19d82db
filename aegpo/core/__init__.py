"""Core: the words everybody speaks. Records, interfaces, specs of parts and experiments, registry, hooks, contracts.

Imports errors only; nothing here imports torch when it is imported.
"""
