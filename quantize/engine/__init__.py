"""The streaming quantizer: one decoder layer in memory at a time, resumed at the layer.

Runs inside the llmcompressor environment. Schemes, packing and rounding are compressed-tensors' and
llm-compressor's own functions; what is here is the order in which things are read, computed and
written, and the linear algebra on Gram matrices that replaces running calibration samples again.

`support` is plain data and imports the standard library alone: the core reads it, too.
"""
