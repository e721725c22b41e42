"""The model before any kernel: student, teacher, tokenizers, training, metrics, export.

Import the submodule you need (`from sidmlp.student import Student`). This package shares no code
with the inference package; the checkpoint format that `sidmlp.export` writes is the contract
between the two.
"""
