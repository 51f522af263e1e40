"""The stages, one file each, behind a small protocol; the literal table is in `quantize.planner`.

A stage reads the artifacts of its inputs and its own part of the recipe, and writes files into
`context.files`. It never asks who called it, never prints, and never looks for 'the latest'.
"""
