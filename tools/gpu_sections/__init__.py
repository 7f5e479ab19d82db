"""The sections of tools/gpu.py: what only a GPU can show, a module for each kind of question."""
