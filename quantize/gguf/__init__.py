"""GGUF, llama.cpp's format: its headers, its types, its number formats, the audit of its files."""
