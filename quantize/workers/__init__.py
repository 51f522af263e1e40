"""Programs that run inside an environment; see `quantize.protocol`, `quantize.runner`."""
