"""CIFAR-100's test pictures, from the two pickles that it was published as.

A pickle may run any program. torchvision compares a file's MD5 first and opens it again to unpickle
it, with everything allowed. Here the bytes that were compared are those that are read, and nothing
but arrays, texts and numbers comes out of them. This module imports nothing of this project.
"""

import hashlib
import io
import pickle
from pathlib import Path

import numpy as np

FOLDER = "cifar-100-python"
MD5 = {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc", "meta": "7973b15100ade9c7d40fb424638fde48"}
# All that numpy's arrays call when they are unpickled, by its old and its new names.
ARRAYS = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class ArraysAlone(pickle.Unpickler):
    """An unpickler that knows no function but those that make arrays."""

    def find_class(self, module: str, name: str):
        """Raises: UnpicklingError for any other."""
        if (module, name) not in ARRAYS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def read_cifar100(root: Path) -> tuple[np.ndarray, list[int], list[str]]:
    """Pictures uint8 (10000, 32, 32, 3), their labels, and the names of the hundred classes.

    Raises: FileNotFoundError, or ValueError for a file that is not the published one.
    """
    test, meta = (_arrays(root / FOLDER / name) for name in ("test", "meta"))
    pixels = test["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # (K, H, W, 3)
    return np.ascontiguousarray(pixels), list(test["fine_labels"]), list(meta["fine_label_names"])


def _arrays(file: Path) -> dict:
    content = file.read_bytes()
    if hashlib.md5(content).hexdigest() != MD5[file.name]:
        raise ValueError(f"{file} is not the file that was published: download it again")
    try:
        return ArraysAlone(io.BytesIO(content), encoding="latin1").load()  # of Python 2's texts
    except Exception as error:  # of a file that was made to hurt, anything
        raise ValueError(f"{file} holds more than arrays ({error})") from None
