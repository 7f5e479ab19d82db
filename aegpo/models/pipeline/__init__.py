"""What the adapters of diffusers pipelines share: finding and loading them, prompts, schedules, guidance, images."""
