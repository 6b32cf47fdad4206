"""Parquet files: tables of their bytes, read in the thread that asks, and back.

PyArrow's own threads give back what Python holds after a table is read, and abort a program that ends meanwhile: one
`rank` of 300 did so.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

COMPRESSION = "zstd"


def read_parquet(data: bytes) -> pa.Table:
    """The table that a Parquet file's bytes hold; ArrowException where they hold none."""
    return pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)


def parquet_bytes(table: pa.Table) -> bytes:
    """The file that holds the table, made in memory."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression=COMPRESSION)
    return sink.getvalue().to_pybytes()


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write the file that holds the table, piece by piece."""
    # To PyArrow a path with a colon is an address.
    with path.open("wb") as file:
        pq.write_table(table, file, compression=COMPRESSION)
