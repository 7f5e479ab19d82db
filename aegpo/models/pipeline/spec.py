"""What every model kind that reads a diffusers pipeline is made of, from its options to its model; imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aegpo.core.experiment import Experiment
from aegpo.core.interfaces import Model
from aegpo.core.records import Footprint
from aegpo.models.pipeline.options import PipelineOptions

if TYPE_CHECKING:
    import torch


class PipelineSpec(PipelineOptions):
    """A network out of a pipeline that `save_pretrained` wrote, or of one on the hub."""

    def build(self, device: torch.device) -> Model:
        """Loads the network and the VAE; text encoders are loaded when a prompt is not in the cache."""
        from aegpo.models.pipeline.model import PipelineModel

        return PipelineModel(self, device)

    def footprint(self, experiment: Experiment) -> Footprint:
        """What a run needs in memory, from configs alone; imports torch."""
        from aegpo.models.pipeline.footprint import footprint

        return footprint(self, experiment)
