"""Runs: folders on disk. Manifest, checkpoints, opening, the loop of a run, its observers, processes of their own.

Imports train and the rooms above it.
"""
