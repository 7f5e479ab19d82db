"""Runs at tracking services, through accelerate's trackers: what they are told, by which names, and how it begins."""

from aegpo.runs.tracking.tracker import AccelerateTracker

__all__ = ["AccelerateTracker"]
