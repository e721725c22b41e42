"""Residual vector quantisation within a network: nearest codes, gradients, restarts.

With r_1 = z and e_l the centre of level l nearest to r_l: r_{l+1} = r_l - e_l, the quantised z is
sum e_l. Gradients pass the quantiser as if it were the identity (van den Oord et al. 2017).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

UPDATES = ("gradient", "ema")


class ResidualQuantizer(nn.Module):
    """Codebooks of several levels, float32 [C_l, dim] each.

    update: "gradient" (centres learn by |sg(r) - e|^2) or "ema" (centres are running means of the
    vectors that choose them, forgetting by ``decay`` a step). commitment: weight of |r - sg(e)|^2,
    which keeps the encoder near its centres.
    """

    def __init__(
        self, centres: Sequence[Tensor], *, update: str, commitment: float, decay: float
    ) -> None:
        super().__init__()
        if update not in UPDATES:
            raise ValueError(f"update: expected one of {', '.join(UPDATES)}, got {update!r}")
        learns = update == "gradient"
        self.centres = nn.ParameterList([nn.Parameter(c.clone(), learns) for c in centres])
        self.update = update
        self.commitment = commitment
        self.decay = decay
        # Running count and sum of the vectors that chose each centre; used by "ema" alone.
        self._sizes = [c.new_ones(len(c)) for c in centres]
        self._sums = [c.clone() for c in centres]
        self._uses = [c.new_zeros(len(c)) for c in centres]

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Quantised z [B, dim], gradient as of z, and the loss of codebooks and commitment, []."""
        rest, total, loss = z, torch.zeros_like(z), z.new_zeros(())
        for level, centres in enumerate(self.centres):
            code = nearest(rest.detach(), centres.detach())
            chosen = centres[code]
            loss = loss + self.commitment * (rest - chosen.detach()).square().sum(1).mean()
            if self.update == "gradient":
                loss = loss + (rest.detach() - chosen).square().sum(1).mean()
            if self.training:
                self._count(level, rest.detach(), code)
            total = total + chosen.detach()
            rest = rest - chosen.detach()
        return z + (total - z).detach(), loss

    @torch.no_grad()
    def restart_dead(self, z: Tensor, generator: torch.Generator) -> list[Tensor]:
        """Moves every centre that nobody chose since the last call to a badly served residual.

        z: float [n, dim], vectors to choose from; one is drawn with a chance proportional to its
        squared error, so a vector that a centre meets exactly is never drawn. Returns the restarted
        codes of each level, int64 [restarted]. Fewer than are dead when residuals run out.
        """
        rest, restarted = z, []
        for level, centres in enumerate(self.centres):
            dead = torch.nonzero(self._uses[level] == 0).flatten()
            error = (rest - centres[nearest(rest, centres)]).square().sum(1).cpu()
            draws = min(dead.numel(), int((error > 0).sum()))
            dead = dead[:draws]
            if draws:
                rows = torch.multinomial(error, draws, generator=generator).to(z.device)
                centres[dead] = rest[rows]
                self._sizes[level][dead] = 1
                self._sums[level][dead] = rest[rows]
            self._uses[level].zero_()
            rest = rest - centres[nearest(rest, centres)]
            restarted.append(dead)
        return restarted

    @torch.no_grad()
    def _count(self, level: int, rest: Tensor, code: Tensor) -> None:
        centres = self.centres[level]
        # A product with one-hot rows sums in a fixed order; index_add_ does not on a GPU.
        chosen = F.one_hot(code, len(centres)).to(rest.dtype)
        sizes = chosen.sum(0)
        self._uses[level] += sizes
        if self.update == "ema":
            self._sizes[level].lerp_(sizes, 1 - self.decay)
            self._sums[level].lerp_(chosen.T @ rest, 1 - self.decay)
            # Count and sum of a centre that nobody chooses fade alike, so it stays where it is;
            # once the count is all but gone the quotient would be noise.
            alive = self._sizes[level] > 1e-6
            centres[alive] = self._sums[level][alive] / self._sizes[level][alive, None]


def nearest(vectors: Tensor, centres: Tensor) -> Tensor:
    """Index of the nearest centre of each vector [B, dim], int64 [B], in the vectors' precision."""
    return torch.cdist(vectors, centres).argmin(dim=1)
