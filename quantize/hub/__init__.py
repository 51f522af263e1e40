"""The Hub: the one place that talks to it.

`client` makes huggingface_hub ready and turns its errors into ours; `repository` reads revisions,
files and permissions; `push` publishes, by way of `target`, `files`, `refs` and `readback`;
`preflight` asks beforehand.
"""
