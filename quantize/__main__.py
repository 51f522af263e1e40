"""`python -m quantize` is the `quantize` command."""

from quantize.cli import main

main()
