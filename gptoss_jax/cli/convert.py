"""The command `convert`."""

from pathlib import Path

import click

from ..errors import UserError
from .options import mesh_sizes, progress, size


@click.command()
@click.argument("model")
@click.option("--to", type=click.Choice(["orbax", "hf"]), required=True, help="Orbax, or Hugging Face form.")
@click.option(
    "--format", "form", type=click.Choice(["same", "mxfp4", "bf16"]), default="same", help="Form of the experts."
)
@click.option("--max-shard-size", callback=size, default="5GB", help="With --to hf: largest size of a file.")
@click.option(
    "--mesh",
    callback=mesh_sizes,
    help="With --to orbax: data=N,expert=M, the devices from which arrays are saved.  [default: all]",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the checkpoint.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output folder, at the end.")
def convert(
    model: str,
    to: str,
    form: str,
    max_shard_size: int,
    mesh: tuple[int, int] | None,
    out: Path,
    overwrite: bool,
) -> None:
    """Write MODEL as an Orbax checkpoint or in Hugging Face form.

    MODEL is a folder in Hugging Face form, an Orbax checkpoint of this project, a hub id, or nano, the small model
    that ships with the project. What has the asked form keeps its bytes. Every mesh can restore an Orbax checkpoint,
    from whichever it was saved.
    """
    import jax

    from convert import folder as folders
    from convert import orbax, published
    from convert.sources import open_source

    from ..devices import mesh as sharding
    from ..files import atomic as outputs

    if mesh and to == "hf":
        raise UserError("--mesh goes with --to orbax: files in Hugging Face form are written by one process")
    outputs.check_free(out, overwrite)
    source = open_source(model)
    outputs.check_apart(out, source.folder, or_inside=True)
    quantize = source.quantized if form == "same" else form == "mxfp4"
    if to == "orbax" and quantize and not source.quantized:
        raise UserError(f"{model}: its experts are BF16: make them MXFP4 with --to hf --format mxfp4 first")
    if to == "orbax":
        devices = sharding.make(source.config, *(mesh or sharding.default_sizes(source.config, jax.device_count())))
    with outputs.new_folder(out, overwrite) as folder:
        if to == "orbax":
            wanted = orbax.plan(source.config, devices, "mxfp4" if quantize else "bf16")
            with progress(sum(map(orbax.nbytes, wanted.values())), "B") as advance:
                orbax.write(source, folder, wanted, advance)
        else:
            groups = published.plan(source, quantize)
            with progress(sum(t.nbytes for group in groups for t in group), "B") as advance:
                config = folders.pruned_config(source.config_json, source.config.num_experts, quantize)
                folders.write_checkpoint(folder, groups, config, source.folder, max_shard_size, advance)
    experts = f"{source.config.num_experts} {'MXFP4' if quantize else 'BF16'} experts"
    click.echo(
        f"{source.config.num_layers} layers of {experts} for {'Orbax' if to == 'orbax' else 'Hugging Face'}: {out}"
    )
