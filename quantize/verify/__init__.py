"""Whether a published checkpoint is still what was published: `quantize verify`."""
