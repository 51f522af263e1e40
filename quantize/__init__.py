"""Recipe-driven quantization of fine-tuned checkpoints, measured on the served artifact."""

__version__ = "0.1.0"
