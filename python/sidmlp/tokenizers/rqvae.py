"""RQ-VAE: an autoencoder whose bottleneck is a residual quantiser (Zeghidour et al. 2021).

TIGER's tokenizer (Rajput et al. 2023, section 3.1). An MLP maps an item vector x to z, the levels
quantise z, a mirrored MLP maps the sum of the centres back. Loss of a batch:
|x - x'|^2 + sum over levels of |sg(r) - e|^2 + commitment |r - sg(e)|^2, means over the batch; the
second term is missing where centres are running means.
"""

from __future__ import annotations

import itertools
import logging
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sidmlp.progress import bar
from sidmlp.training import TrainingFailed

from .codebooks import Codebooks, check_request, deviation
from .kmeans import assign
from .residual_quantizer import UPDATES, ResidualQuantizer
from .rkmeans import residual_kmeans

logger = logging.getLogger(__name__)

# Restarts and first centres look at so many vectors at most: enough for the largest codebooks.
SAMPLE = 16_384


@dataclass(frozen=True)
class RqVaeOptions:
    """Sizes and training of an RQ-VAE.

    latent: width of z; hidden: widths of the encoder's layers between (the decoder mirrors them);
    update, decay, commitment: see `ResidualQuantizer`; restart: dead codes start anew after each
    epoch but the last; device: "cpu", "cuda", ...
    """

    latent: int = 32
    hidden: tuple[int, ...] = (256, 128)
    update: str = "gradient"
    epochs: int = 300
    batch_size: int = 1024
    learning_rate: float = 1e-3
    commitment: float = 0.25
    decay: float = 0.9
    restart: bool = True
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.update not in UPDATES:
            raise ValueError(f"update: expected one of {', '.join(UPDATES)}, got {self.update!r}")
        for name in ("latent", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden: expected widths of at least 1, got {self.hidden}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate: expected a positive number, got {self.learning_rate}")
        if not 0 <= self.commitment < math.inf:
            raise ValueError(f"commitment: expected a number >= 0, got {self.commitment}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay: expected 0 <= decay < 1, got {self.decay}")


@dataclass(frozen=True)
class RqVaeCodebooks(Codebooks):
    """As `Codebooks` of the vectors z: centres are float32 [C_l, latent].

    residual: share of z's squared deviation left after each level; decoded: float32 [N, d], what
    the decoder makes of all levels; error: share of the item vectors' squared deviation that
    ``decoded`` misses; restarts: codes restarted per level, over the whole training.
    """

    decoded: np.ndarray
    error: float
    restarts: tuple[int, ...]

    def reconstruct(self) -> np.ndarray:
        """The item vectors that the codes stand for, float32 [N, d]."""
        return self.decoded


def train_rqvae(
    vectors: np.ndarray,
    codes_per_level: tuple[int, ...],
    options: RqVaeOptions | None = None,
    *,
    seed: int = 0,
    backend: str = "auto",
) -> RqVaeCodebooks:
    """Trains an RQ-VAE on ``vectors`` float32 [N, d] and returns their codes.

    backend runs the k-means that the centres start from; see `residual_kmeans`. The same seed gives
    the same codes on the same machine and thread count. Raises ValueError when a level asks for
    more codes than there are items, and TrainingFailed when the loss is not finite.
    """
    check_request(vectors, codes_per_level)
    options = RqVaeOptions() if options is None else options
    device = _device(options.device)
    # One scale for all coordinates: the learning rate fits, distances keep their proportions.
    middle = vectors.mean(0, dtype=np.float64)
    scale = math.sqrt(deviation(vectors) / vectors.size)
    points = torch.from_numpy(((vectors - middle) / scale).astype(np.float32)).to(device)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        widths = (vectors.shape[1], *options.hidden, options.latent)
        encoder, decoder = _mlp(widths).to(device), _mlp(widths[::-1]).to(device)
    quantizer = _start(encoder, points, codes_per_level, options, generator, seed, backend)
    restarts = _train(encoder, quantizer, decoder, points, options, generator)
    latent = _in_blocks(encoder, points)
    codes, residual, total = _codes(latent, quantizer)
    decoded = _in_blocks(decoder, torch.from_numpy(total).to(device)) * scale + middle
    error = float(((vectors - decoded) ** 2).sum()) / deviation(vectors)
    logger.info("RQ-VAE: %.1f %% of the squared deviation is lost", 100 * error)
    centres = tuple(c.detach().cpu().numpy() for c in quantizer.centres)
    decoded = decoded.astype(np.float32)
    return RqVaeCodebooks(codes, centres, residual, decoded, error, restarts)


def _mlp(widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])  # no activation after the last


def _start(
    encoder: nn.Module,
    points: Tensor,
    codes_per_level: tuple[int, ...],
    options: RqVaeOptions,
    generator: torch.Generator,
    seed: int,
    backend: str,
) -> ResidualQuantizer:
    """The quantiser with centres by k-means of what the untrained encoder makes of the items."""
    latent = _in_blocks(encoder, _sample(points, generator, at_least=max(codes_per_level)))
    found = residual_kmeans(latent, codes_per_level, seed=seed, iterations=10, backend=backend)
    centres = [torch.from_numpy(c).to(points.device) for c in found.centres]
    return ResidualQuantizer(
        centres, update=options.update, commitment=options.commitment, decay=options.decay
    )


def _train(
    encoder: nn.Module,
    quantizer: ResidualQuantizer,
    decoder: nn.Module,
    points: Tensor,
    options: RqVaeOptions,
    generator: torch.Generator,
) -> tuple[int, ...]:
    """Trains all three in place; returns how many codes of each level were restarted."""
    modules = nn.ModuleList([encoder, quantizer, decoder]).train()
    learning = [p for p in modules.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learning, lr=options.learning_rate)
    restarts = [0] * len(quantizer.centres)
    for epoch in bar(range(options.epochs), "RQ-VAE"):
        summed = torch.zeros((), device=points.device)
        order = torch.randperm(len(points), generator=generator).to(points.device)
        for rows in order.split(options.batch_size):
            batch = points[rows]
            quantised, loss = quantizer(encoder(batch))
            loss = loss + (decoder(quantised) - batch).square().sum(1).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            summed += loss.detach()
        if not math.isfinite(float(summed)):
            raise TrainingFailed(
                f"RQ-VAE: the loss of epoch {epoch + 1} is not finite; use a lower learning rate "
                f"than {options.learning_rate}"
            )
        if options.restart and epoch + 1 < options.epochs:
            with torch.no_grad():
                sample = encoder(_sample(points, generator))
            for level, dead in enumerate(quantizer.restart_dead(sample, generator)):
                restarts[level] += dead.numel()
                # A fresh centre must not be carried off by the momentum of the dead one.
                for moment in optimizer.state.get(quantizer.centres[level], {}).values():
                    if moment.dim():
                        moment[dead] = 0
    modules.eval()
    return tuple(restarts)


def _codes(
    latent: np.ndarray, quantizer: ResidualQuantizer
) -> tuple[np.ndarray, tuple[float, ...], np.ndarray]:
    """Codes int64 [N, levels], share of deviation left per level, sum of the centres [N, latent].

    By distances in float64, as `assign` says, whatever precision training used.
    """
    rest, codes, residual = latent, [], []
    spread = deviation(latent)
    for parameter in quantizer.centres:
        centres = parameter.detach().cpu().numpy()
        codes.append(assign(rest, centres))
        rest = rest - centres[codes[-1]]
        residual.append(float((rest.astype(np.float64) ** 2).sum()) / spread)
    return np.stack(codes, axis=1), tuple(residual), latent - rest


def _sample(points: Tensor, generator: torch.Generator, at_least: int = 0) -> Tensor:
    size = max(SAMPLE, at_least)
    if len(points) <= size:
        return points
    return points[torch.randperm(len(points), generator=generator)[:size].to(points.device)]


@torch.no_grad()
def _in_blocks(module: nn.Module, points: Tensor) -> np.ndarray:
    return torch.cat([module(block).cpu() for block in points.split(SAMPLE)]).numpy()


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device: expected one that torch can use here, got {name!r} ({reason}); use 'cpu'"
        ) from None
    return device
