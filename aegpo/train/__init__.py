"""Train: one training step. Policy, engine, rollouts, replay, learning, scoring.

Imports attention, method, models and the rooms above them; knows no folder of runs.
"""
