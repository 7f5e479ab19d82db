"""Model adapters, one file or folder a model."""
