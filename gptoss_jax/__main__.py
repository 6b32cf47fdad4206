"""`python -m gptoss_jax`."""

from .cli import main

main()
