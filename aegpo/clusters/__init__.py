"""Clusters: runs as jobs of Slurm, of Ray or of this machine; three verbs for each, and what they have in common.

Imports runs, parallel, core and errors. A job is the command that goes on with a run, so a cluster may end it and start
it again at any time. Submitit and Ray are imported where they are used.
"""
