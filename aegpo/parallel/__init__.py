"""Parallel: one run over several processes; who they are, what they say and send, how they are started and watched.

Imports core and errors. A run of one process is a team of one: then nothing is sent, and the code that computes reads
as if there were no other.
"""
