"""Method: what an arm chooses. Allocators, selectors, trees, samplers, advantages, objectives; plans and their costs.

Imports core and prompts; nothing here knows a network or a run.
"""
