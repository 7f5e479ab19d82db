"""What every model kind that reads a diffusers pipeline is made of, from its options to its model; imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from aegpo.core.experiment import Experiment
from aegpo.core.footprint import Footprint
from aegpo.core.interfaces import Model
from aegpo.models.pipeline.options import PipelineOptions

if TYPE_CHECKING:
    import torch


class PipelineSpec(PipelineOptions):
    """A network out of a pipeline that `save_pretrained` wrote, or of one on the hub."""

    def build(self, device: torch.device) -> Model:
        """Loads the network and the VAE; text encoders are loaded when a prompt is not in the cache."""
        from aegpo.models.pipeline.model import PipelineModel

        return PipelineModel(self, device)

    def build_unread(self, device: torch.device) -> Model:
        """The same with no values in the network, of which each process is to read its part; else as `build`."""
        from aegpo.models.pipeline.loading import pipeline_folder
        from aegpo.models.pipeline.model import PipelineModel
        from aegpo.models.pipeline.unread import has_files

        return PipelineModel(self, device, unread=has_files(self, pipeline_folder(self)))

    def settled(self, experiment: Experiment, free: int) -> Self:
        """Whether activations are computed again, for `free` bytes; what is on the hub only is downloaded for it."""
        if self.gradient_checkpointing != "auto":
            return self
        if self.base_folder is None:
            from aegpo.models.pipeline.loading import pipeline_folder

            pipeline_folder(self)  # else the estimate would be the published network's
        return self.model_copy(update={"gradient_checkpointing": self.footprint(experiment).on(free).recomputes})

    def footprint(self, experiment: Experiment) -> Footprint:
        """What a run needs in memory, from configs alone; imports torch."""
        from aegpo.models.pipeline.footprint import footprint

        return footprint(self, experiment)
