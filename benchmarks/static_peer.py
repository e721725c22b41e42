"""A STATIC-style peer: catalogue constraints as masks from a CSR trie, in plain torch operators.

STATIC (Google: Su et al., "Vectorizing the Trie: Efficient Constrained Decoding for LLM-based
Generative Retrieval on Accelerators", arXiv 2602.22647) keeps the catalogue's trie as one CSR
matrix on the accelerator, so that constrained decoding becomes gathers of fixed size and masks over
the whole vocabulary. This is that idea around a SID-MLP student, written for torch.compile and a
CUDA graph; no line of it is Google's.

Alike: the trie is flattened to CSR arrays on the device; a step reads as many entries of every
beam's row as the level's largest fan-out has, invalid ones masked, whatever the data; every beam
gets logits of all C codes; the host takes no part.

Not alike: STATIC takes the log-softmax over all codes and masks afterwards; a student normalises
over a node's children, so here the mask comes first (at level 1 STATIC's order is the student's).
STATIC's first two levels are dense tables of C x C flags and states, and its others gather the
children's log-probabilities; here every level scatters its children's node numbers into
[batch, beams, C], whose entries >= 0 are the mask and, once chosen, the next nodes, and one topk
cuts [beams x C]. The logits are those of the folded TorchPeer (prefix tables), so that only the
constraint differs.
"""

from __future__ import annotations

import math

import torch
from decode_checks import Results
from torch import Tensor
from torch.nn import functional
from torch_peer import TorchPeer


class StaticPeer(TorchPeer):
    """TorchPeer with dense logits under a scattered mask instead of gathered children.

    Decodes as `sidmlp.beam.decode_states` does, with TorchPeer's limits.
    """

    def beam_decode(self, context: Tensor) -> Results:
        """context [B, D] in the student's dtype -> items, scores, codes, counts."""
        first = None
        if self.folded:
            first = functional.linear(context, self.context_weight, self.context_bias)
            first = first.unflatten(1, (self.num_levels, -1))  # [B, L, H]
        scores = nodes = codes = None
        for level in range(self.num_levels):
            last = level == self.num_levels - 1
            num_codes = self.student.config.codes_per_level[level]
            log_probs = self._logits(level, context, first, codes).float()
            if level == 0:
                children = self._scattered(level, self.offsets[0].new_zeros(1, 1), num_codes)
                children = children.expand(len(context), -1, -1)  # of the root: [B, 1, C]
                log_probs = log_probs.log_softmax(dim=-1)[:, None]
                found = log_probs.masked_fill(children < 0, -math.inf)
            else:
                children = self._scattered(level, nodes, num_codes)  # [B, W, C]
                masked = log_probs.masked_fill(children < 0, -math.inf)
                found = scores[..., None] + masked.log_softmax(dim=-1)
            if last:
                found = found.masked_fill(~self.open_leaves[children.clamp(min=0)], -math.inf)
            found, children = found.flatten(1), children.flatten(1)
            width = self.k if last else self.num_beams
            width = min(width, found.shape[1], len(self.codes[level]))
            scores, index = found.topk(width, dim=1, sorted=last)
            nodes = children.gather(1, index).long().clamp(min=0)
            chosen = (index % num_codes)[..., None]
            if codes is None:
                codes = chosen
            else:
                parent = (index // num_codes)[..., None].expand(-1, -1, level)
                codes = torch.cat([codes.gather(1, parent), chosen], dim=-1)
        return self._emit(scores, nodes, codes)

    def _scattered(self, level: int, nodes: Tensor, num_codes: int) -> Tensor:
        """Children of nodes [B, W] by their codes: int32 [B, W, C], -1 where there is none."""
        begin, fanout = self.begins[level][nodes], self.fanouts[level][nodes]
        child = (begin[..., None] + self.offsets[level]).clamp(max=len(self.codes[level]) - 1)
        exists = self.offsets[level] < fanout[..., None]  # [B, W, F]
        # What does not exist lands in column C, which is cut off.
        column = torch.where(exists, self.codes[level][child], num_codes)
        empty = torch.full(
            (*nodes.shape, num_codes + 1), -1, dtype=torch.int32, device=nodes.device
        )
        return empty.scatter(-1, column, child.int())[..., :num_codes]
