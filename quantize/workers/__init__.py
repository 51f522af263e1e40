"""Programs that run inside an environment; started by `quantize.runner`, see `quantize.protocol`."""
