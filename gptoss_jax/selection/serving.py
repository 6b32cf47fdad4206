"""What common serving kernels say to a number of experts. Letters: see `config`."""


def serving_limits(num_kept: int, top_k: int | None) -> list[str]:
    """A sentence for each rule of common kernels that a model of so many experts a layer breaks."""
    told = []
    if num_kept % 4:
        told.append(f"Kernels of some servers want a multiple of 4 experts; this model has {num_kept}.")
    if top_k is not None and num_kept <= top_k:
        told.append(
            f"Every token uses all {num_kept} experts of a layer: the router only weighs them, and kernels of some "
            "servers refuse that."
        )
    return told
