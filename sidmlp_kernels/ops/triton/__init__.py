"""The Triton backend: `torch.ops.sidmlp.X_triton`, for every GPU that Triton compiles for.

    kernels.py    what is launched; how the work is cut
    beam.py       one request's beam search          selection.py  beam keys and top-k
    heads.py      hidden rows                        readout.py    states -> context
    items.py      leaves to items                    product.py    matrix products; common.py  the rest
    bound.py      operators bound to weights, catalogue and settings
    problem.py    checks of arguments                tiles.py      the table of tile sizes
    scratch.py    a program's workspace              launch.py, compiler.py  code and launches

Importing this package imports triton.
"""
