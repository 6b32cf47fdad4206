"""Quality: how a model expects and writes text beside the model that it was cut from. Letters: see `config`."""
