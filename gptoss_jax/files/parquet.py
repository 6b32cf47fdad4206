"""Parquet files, read in the thread that asks.

PyArrow's own threads give back what Python holds after a table is read, and abort a program that ends meanwhile: one
`rank` of 300 did so.
"""

import pyarrow as pa
import pyarrow.parquet as pq


def read_parquet(data: bytes) -> pa.Table:
    """The table that a Parquet file's bytes hold; ArrowException where they hold none."""
    return pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)


def parquet_bytes(table: pa.Table) -> bytes:
    """The file that holds the table, made in memory."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()
