"""Speed and accuracy of the kernels on the GPU at hand, next to a peer that is measured in the same run.

`python -m pallas_kernels.bench --help`. How time is taken is told in `timing.py`, the peers in `peers.py`; each operation
has a module that lists its cases.
"""
