"""Which rows a profile counted, read from its store without the sums, and so without JAX."""

import json
from typing import Any

import numpy as np

from ..errors import ProfileError, reason
from ..files.paths import AnyPath, storage_errors

STORE = "statistics.safetensors"
ROW_HASHES = "row_hashes"
MAX_HEADER = 100_000_000  # the limit of the safetensors library


def counted_rows(store: AnyPath) -> np.ndarray | None:
    """The hashes of the rows, uint64 [rows], sorted, as `rows.row_hashes` gives them; None where there is no store.

    ProfileError where the file is damaged.
    """
    stream: Any  # those of fsspec can be read in parts too
    try:
        with storage_errors(store), store.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > MAX_HEADER:
                raise ValueError("its header is too long")
            entry = json.loads(stream.read(length))[ROW_HASHES]
            begin, end = entry["data_offsets"]
            if entry["dtype"] != "U64" or not 0 <= begin <= end:
                raise ValueError("its rows have no hashes")
            stream.seek(8 + length + begin)
            data = stream.read(end - begin)
            if len(data) < end - begin:
                raise ValueError("it is cut")
            return np.sort(np.frombuffer(data, "<u8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise ProfileError(f"{store}: not the sums of a profile ({reason(error)}): profile its rows again") from None
