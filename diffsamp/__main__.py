"""``python -m diffsamp``."""

from .cli import main

main()
