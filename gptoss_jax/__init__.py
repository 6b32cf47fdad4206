"""Profile, understand and prune the experts of GPT-OSS in JAX.

The way through the code, token to saliency to checkpoint: `rows` → `harmony` → `batching` →
`model` (`rope`, `attention`, `router`, `experts`, `moe`) → `forward` → `saliency` → `profile`
→ `select`; the package `convert` reads and writes checkpoints; `cli` ties both together.

Importing this package imports no JAX, so that the command line answers at once.
"""

__version__ = "0.1.0"
