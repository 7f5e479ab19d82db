"""The door for models that are made of diffusers pipelines: the spec, the family, schedules and tokens.

Importing this module imports no torch, so that specs can be read without; no room imports it.
"""

from __future__ import annotations

from aegpo.core.parts import ATTENTION_TARGETS, JOINT_BLOCKS
from aegpo.models.pipeline.diffusion import VariancePreserving
from aegpo.models.pipeline.family import Family, Rescaling, SizeTold
from aegpo.models.pipeline.options import CLIP_TOKENS, PIXELS_PER_LATENT
from aegpo.models.pipeline.packing import PATCH, pack, unpack
from aegpo.models.pipeline.schedules import DdimSchedule, FlowSchedule, ddim_schedule, flow_schedule
from aegpo.models.pipeline.spec import PipelineSpec
from aegpo.models.pipeline.unet import UnetSpec

__all__ = [
    "ATTENTION_TARGETS",
    "CLIP_TOKENS",
    "DdimSchedule",
    "Family",
    "FlowSchedule",
    "JOINT_BLOCKS",
    "PATCH",
    "PIXELS_PER_LATENT",
    "PipelineSpec",
    "Rescaling",
    "SizeTold",
    "UnetSpec",
    "VariancePreserving",
    "ddim_schedule",
    "flow_schedule",
    "pack",
    "unpack",
]
