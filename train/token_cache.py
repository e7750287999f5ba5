"""Arrays on disk that took long to make: a folder of .npy files, which are mapped into memory when they are read.

  FOLDER/tokens.npy, ...     an array each
  FOLDER/digests.json        the BLAKE2b digest of each file, by name

A folder gets its name when all that belongs in it is on the disk, so a process that dies leaves nothing that looks
whole. What happens to the files later (a copy cut short, a flipped bit) the digests tell: reading the files once costs
a second for 1 GB, and the mapping finds them in memory afterwards.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

logger = logging.getLogger(__name__)

DIGESTS_FILE = 'digests.json'


def read(folder: Path) -> dict[str, np.ndarray] | None:
    """The arrays by name, read-only and mapped; None if there is no folder or, with a warning, if it is damaged."""
    if not folder.exists():
        return None
    try:
        digests = json.loads((folder / DIGESTS_FILE).read_bytes())
        if not isinstance(digests, dict):
            raise ValueError(f'{DIGESTS_FILE} holds no object')
        for name, expected in digests.items():
            if _digest(folder / name) != expected:
                raise ValueError(f'{name} has changed')
        return {name.removesuffix('.npy'): np.load(folder / name, mmap_mode='r').view(np.ndarray) for name in digests}
    except (OSError, ValueError) as error:
        logger.warning('%s is damaged and not used: %s', folder, error)
        return None


def write(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Puts the arrays there, in place of what a damaged folder holds; another process that does so, too, may come first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix='partial-', dir=folder.parent))
    try:
        for name, array in arrays.items():
            np.save(partial / f'{name}.npy', array, allow_pickle=False)
        digests = {file.name: _digest(file) for file in sorted(partial.iterdir())}
        (partial / DIGESTS_FILE).write_text(json.dumps(digests, indent=1), encoding='utf-8')
        for file in partial.iterdir():
            with file.open('rb') as opened:
                os.fsync(opened.fileno())
        if folder.exists():
            shutil.rmtree(folder)
        try:
            partial.rename(folder)
        except OSError:
            if not (folder / DIGESTS_FILE).exists():
                raise
            shutil.rmtree(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _digest(file: Path) -> str:
    with file.open('rb') as opened:
        return hashlib.file_digest(opened, 'blake2b').hexdigest()
