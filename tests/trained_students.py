"""Trained students and what tier 4 asks of a backend's metrics on their held-out users."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sidmlp.beam import Decoded, decode_states
from sidmlp.metrics import Metric, ndcg_at_k, recall_at_k, users_that_differ
from sidmlp.student import Student
from sidmlp.trie import Trie
from sidmlp_kernels import Catalogue, Recommender, StudentSpec
from sidmlp_kernels import Student as KernelStudent

BEAUTY = Path(__file__).resolve().parents[2] / "shared" / "data" / "amazon14_beauty"


@dataclass(frozen=True)
class Trained:
    """A trained reference student, its catalogue and held-out users."""

    student: Student
    codes: np.ndarray  # [N, L]
    states: Tensor  # [users, T, D]
    mask: Tensor
    exclude: list[np.ndarray]
    targets: Tensor
    num_beams: int

    def reference(self, dtype: torch.dtype) -> Tensor:
        """Items [users, 10] of the reference in `dtype`."""
        student = Student(self.student.config)
        student.load_state_dict(self.student.state_dict())
        student = student.to(dtype).eval()
        trie = Trie.from_codes(self.codes, codes_per_level=student.config.codes_per_level)
        found = []
        for begin in range(0, len(self.targets), 128):
            rows = slice(begin, begin + 128)
            args = (self.states[rows].to(dtype), self.mask[rows], trie, 10, self.num_beams)
            decoded: Decoded = decode_states(student, *args, self.exclude[rows])
            found.append(decoded.items)
        return torch.cat(found)

    def kernel(self, backend: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Items [users, 10] of the kernel with weights in `dtype`."""
        spec = StudentSpec(**asdict(self.student.config))
        model = Recommender(
            KernelStudent(spec, self.student.state_dict()),
            Catalogue.from_codes(self.codes, codes_per_level=spec.codes_per_level),
            backend=backend,
            dtype=dtype,
        )
        states, mask = self.states.to(device), self.mask.to(device)
        num_beams = self.num_beams
        found = model.decode_states(states, mask, k=10, num_beams=num_beams, exclude=self.exclude)
        return found.items.cpu()

    def metrics(self, items: Tensor) -> dict[str, Metric]:
        """Of items [users, 10]."""
        return {
            f"{name}@{k}": measure(items, self.targets, k)
            for k in (10, 5)
            for name, measure in (("Recall", recall_at_k), ("NDCG", ndcg_at_k))
        }


def check_metrics(trained: Trained, backend: str, device: torch.device) -> None:
    """fp32: four decimals. bf16: at most twice as many users as PyTorch's bf16, plus one."""
    users = len(trained.targets)
    exact = trained.metrics(trained.reference(torch.float32))
    own = trained.metrics(trained.kernel(backend, device, torch.float32))
    rough = trained.metrics(trained.reference(torch.bfloat16))
    own_rough = trained.metrics(trained.kernel(backend, device, torch.bfloat16))
    for name, wanted in exact.items():
        differ = [users_that_differ(wanted, m[name]) for m in (own, rough, own_rough)]
        print(
            f"{name} of {users} users: reference {wanted.mean:.4f}, {backend} fp32 "
            f"{own[name].mean:.4f} ({differ[0]} users differ), PyTorch bf16 "
            f"{rough[name].mean:.4f} ({differ[1]}), {backend} bf16 {own_rough[name].mean:.4f} "
            f"({differ[2]})"
        )
        hits, least = int((wanted.per_user > 0).sum()), 20 if name.endswith("@10") else 10
        assert hits >= least, f"{hits} users with a hit say nothing: train a better student"
        assert round(own[name].mean, 4) == round(wanted.mean, 4), name
        assert differ[2] <= 2 * differ[1] + 1, name
        drift, allowed = (abs(m[name].mean - wanted.mean) for m in (own_rough, rough))
        assert drift <= 2 * allowed + 1 / users, name
