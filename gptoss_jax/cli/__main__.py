"""`python -m gptoss_jax.cli`."""

from . import main

main()
