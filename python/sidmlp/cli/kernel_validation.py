"""Validation by sidmlp_kernels: what early stopping measures is what will be served."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
from torch import Tensor

from sidmlp.distill import Decode, MakeDecode
from sidmlp.student import Student


def kernel_decode(item_codes: np.ndarray, backend: str = "auto") -> MakeDecode:
    """Decodes a student, as it is when asked, on the device where it is; item_codes: int64 [N, L].

    The catalogue is built once; the weights are packed anew for each validation, in fp32, so that
    the metric is the reference's.
    """
    import sidmlp_kernels

    catalogue: list[sidmlp_kernels.Catalogue] = []

    def make(student: Student) -> Decode:
        sizes = student.config.codes_per_level
        if not catalogue:
            catalogue.append(sidmlp_kernels.Catalogue.from_codes(item_codes, codes_per_level=sizes))
        spec = sidmlp_kernels.StudentSpec(**asdict(student.config))
        model = sidmlp_kernels.Recommender(
            sidmlp_kernels.Student(spec, student.state_dict()),
            catalogue[0],
            device=next(student.parameters()).device,
            dtype="float32",
            backend=backend,
        )

        def decode(
            states: Tensor, mask: Tensor, k: int, num_beams: int, exclude: list[np.ndarray]
        ) -> Tensor:
            found = model.decode_states(states, mask, k=k, num_beams=num_beams, exclude=exclude)
            return found.items

        return decode

    return make
