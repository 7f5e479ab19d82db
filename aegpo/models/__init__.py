"""Models: adapters of networks, one folder a family. `pipeline` is what families of diffusers share; LoRA; the base.

Imports attention, prompts and core; specs import no torch, what they build is beside them.
"""
