"""The Triton backend: `torch.ops.sidmlp.X_triton`, for every GPU that Triton compiles for.

    kernels.py    what is launched, and how the work is cut
    beam.py       one request's beam search
    heads.py      hidden rows                   readout.py    states -> context
    selection.py  beam keys and top-k           items.py      leaves to items
    product.py    matrix products               common.py     what all of them share
    bound.py      operators bound to weights, catalogue and settings
    problem.py    checks of arguments           register.py   the operators themselves
    tiles.py      the table of tile sizes       scratch.py    a program's workspace
    compiler.py   machine code                  launch.py     launches
    encode_t5.py, encode_mlp.py   the encoders' kernels; encoder_*.py their parts in the same order:
                  rows, bound, problem, tiles, and packing, which alone imports no triton

Importing this package imports triton.
"""
