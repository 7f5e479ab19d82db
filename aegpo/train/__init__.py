"""Train: one training step. Policy, engine, rollouts, replay, learning, scoring; imports models and the rooms above it.

    list of prompts --stream--> prompts (P) --sources--> Signals --allocator--> counts (P,) --selector--> (P, T)
    --tree--> RolloutPlan --roll_out(policy)--> Rollouts --rewards--> Scores --advantage--> credit (E,)
    --learner(objective)--> gradients, an optimizer step or several --> StepReport

`Engine.step` reads like this figure. Nothing here knows a folder: evaluation and checkpoints are the loop's of a run.
"""
