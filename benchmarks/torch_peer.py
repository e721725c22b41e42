"""The strongest plain-PyTorch decode that we could write: the peer of the GPU backends.

The reference (sidmlp.beam) is written to be read; this decode is written to be compiled and to be
captured in a CUDA graph, so that our kernels are not measured against a straw man:

- no step waits for the device, loops over requests or has a shape that depends on data
- children are gathered padded to the level's largest fan-out, and only chosen ones get a code
- inner cuts take torch.topk without sorting; the last cut goes to k at once
- `folded`: the exact rewrites of weights that our backends have, too. First layers are table
  look-ups, and attention forms neither keys nor values.

It does less than the reference: no exclusions, temperatures 1, level weights 1, softmax over
children, ties in any order, and requests that are not finite are not looked for. Softmax and scores
are float32. Without `folded` the student's modules run as they are.
"""

from __future__ import annotations

import math

import torch
from decode_checks import Results
from torch import Tensor, nn
from torch.nn import functional

from sidmlp.student import Readout, Student
from sidmlp.trie import Trie


class TorchPeer(nn.Module):
    """Decodes as `sidmlp.beam.decode_states` does, for one catalogue, k and num_beams.

    student: float32 on the CPU; a copy in `dtype` on `device` decodes.
    """

    def __init__(
        self,
        student: Student,
        trie: Trie,
        *,
        k: int,
        num_beams: int,
        dtype: torch.dtype,
        device: torch.device | str,
        folded: bool,
    ) -> None:
        super().__init__()
        self.k, self.num_beams, self.folded = k, num_beams, folded
        self.num_levels, self.num_items = trie.num_levels, trie.num_items
        self.max_leaf_items = trie.max_leaf_items
        copy = Student(student.config).eval().requires_grad_(False)
        copy.load_state_dict(student.state_dict())
        # Products of weights are rounded once, from float64.
        exact = copy.double()
        if folded:
            self._keep(folded_readout(exact.readout), dtype, device)
            self._keep(folded_heads(exact), dtype, device)
        self.student = copy.to(device, dtype)

        on = trie.to(device)
        self.begins, self.codes = on.child_begin, on.child_codes
        self.fanouts = tuple(begin.diff() for begin in on.child_begin)
        self.offsets = tuple(torch.arange(n, device=device) for n in trie.max_fanout)
        self.leaf_begin, self.leaf_items = on.leaf_begin, on.leaf_item_ids
        self.available = on.leaf_available
        stock = on.available_before[on.leaf_begin]
        self.open_leaves = stock.diff() > 0

    def _keep(
        self, tensors: dict[str, Tensor], dtype: torch.dtype, device: torch.device | str
    ) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.to(device, dtype).contiguous())

    def decode_states(self, states: Tensor, mask: Tensor) -> Results:
        """states [B, T, D] in the student's dtype, mask bool [B, T] -> items, scores, codes,
        counts as `sidmlp.beam.Decoded` has them."""
        return self.beam_decode(self.context(states, mask))

    def context(self, states: Tensor, mask: Tensor) -> Tensor:
        """states [B, T, D], mask bool [B, T] -> context [B, D]."""
        readout = self.student.readout
        if not self.folded:
            return readout(states, mask)
        heads, dim = readout.attention.num_heads, states.shape[-1]
        x = torch.where(mask[..., None], states, 0)
        mean = x.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        both = functional.linear(mean, self.query_weight, self.query_bias)
        query, probes = both[:, :dim], both[:, dim:].unflatten(1, (heads, dim))
        scores = torch.bmm(probes, x.transpose(1, 2))  # [B, heads, T]
        hidden = ~mask & mask.any(dim=1, keepdim=True)  # nothing valid: equal weights on zeros
        weights = scores.masked_fill(hidden[:, None, :], -math.inf).softmax(dim=-1)
        mixed = torch.bmm(weights, x).flatten(1)
        u = readout.norm1(query + functional.linear(mixed, self.mixed_weight))
        return readout.norm2(u + readout.ffn_out(functional.relu(readout.ffn_in(u))))

    def beam_decode(self, context: Tensor) -> Results:
        """context [B, D] in the student's dtype -> items, scores, codes, counts."""
        first = None
        if self.folded:
            first = functional.linear(context, self.context_weight, self.context_bias)
            first = first.unflatten(1, (self.num_levels, -1))  # [B, L, H]
        scores = nodes = codes = None
        for level in range(self.num_levels):
            last = level == self.num_levels - 1
            num_nodes = len(self.codes[level])
            logits = self._logits(level, context, first, codes).float()
            if level == 0:
                begin = None
                found = logits.log_softmax(dim=-1)[:, self.codes[0]]  # children of the root
                child = self.offsets[0].expand(len(context), -1)
            else:
                begin, fanout = self.begins[level][nodes], self.fanouts[level][nodes]
                exists = self.offsets[level] < fanout[..., None]  # [B, W, F]
                child = (begin[..., None] + self.offsets[level]).clamp(max=num_nodes - 1)
                logits = logits.gather(-1, self.codes[level][child])
                log_probs = logits.masked_fill(~exists, -math.inf).log_softmax(dim=-1)
                found = (scores[..., None] + log_probs).flatten(1)
                child = child.flatten(1)
            if last:  # every leaf that is left gives an item, so k of them are enough
                found = found.masked_fill(~self.open_leaves[child], -math.inf)
            width = min(self.k if last else self.num_beams, found.shape[1], num_nodes)
            scores, index = found.topk(width, dim=1, sorted=last)
            if begin is None:
                nodes = index
            else:
                # Recomputed rather than gathered from `child`, which then need not be stored.
                fan = len(self.offsets[level])
                parent = index // fan
                nodes = (begin.gather(1, parent) + index % fan).clamp(max=num_nodes - 1)
                codes = codes.gather(1, parent[..., None].expand(-1, -1, level))
            chosen = self.codes[level][nodes][..., None]
            codes = chosen if codes is None else torch.cat([codes, chosen], dim=-1)
        return self._emit(scores, nodes, codes)

    def _logits(
        self, level: int, context: Tensor, first: Tensor | None, codes: Tensor | None
    ) -> Tensor:
        """[B, C] at the root, [B, W, C] below; `first` is the context's share of first layers."""
        if first is None:
            if codes is None:
                return self.student.logits(0, context, self.offsets[0].new_zeros(len(context), 0))
            return self.student.logits(level, context[:, None, :], codes)
        head = self.student.heads[level]
        x = first[:, level]
        if codes is not None:
            x = x[:, None]
            for j in range(level):
                x = x + functional.embedding(codes[..., j], getattr(self, f"table_{level}_{j}"))
        block = head.blocks[0]
        x = functional.gelu(block.norm(x), approximate="none")
        for further in head.blocks[1:]:
            x = further(x)
        return head.output(x)

    def _emit(self, scores: Tensor, leaves: Tensor, codes: Tensor) -> Results:
        """Leaves in order of their scores -> items, cut at k and padded."""
        begin = self.leaf_begin[leaves]
        allowed = scores > -math.inf
        position = begin
        if self.max_leaf_items > 1:
            offsets = torch.arange(self.max_leaf_items, device=leaves.device)
            position = begin[..., None] + offsets  # [B, W, M]
            allowed = allowed[..., None] & (position < self.leaf_begin[leaves + 1][..., None])
            position = position.clamp(max=self.num_items - 1).flatten(1)
            allowed = allowed.flatten(1) & self.available[position]
            # A stable sort keeps the order of leaves, and catalogue order inside a leaf.
            order = (~allowed).byte().argsort(dim=1, stable=True)[:, : self.k]
            allowed, position = allowed.gather(1, order), position.gather(1, order)
            beam = order // self.max_leaf_items
            scores = scores.gather(1, beam)
            codes = codes.gather(1, beam[..., None].expand(-1, -1, self.num_levels))
        items = torch.where(allowed, self.leaf_items[position], -1)
        scores = torch.where(allowed, scores, -math.inf)
        codes = torch.where(allowed[..., None], codes, -1).int()
        missing = self.k - items.shape[1]
        if missing > 0:
            items = functional.pad(items, (0, missing), value=-1)
            scores = functional.pad(scores, (0, missing), value=-math.inf)
            codes = functional.pad(codes, (0, 0, 0, missing), value=-1)
        return items, scores, codes, allowed.sum(dim=1, dtype=torch.int32)


def folded_readout(readout: Readout) -> dict[str, Tensor]:
    """Attention of one query without keys and values: per head, (W_k^T W_q / sqrt(d)) q meets the
    states themselves, and W_o W_v their mixture. The query comes from the mean in the same step."""
    attention = readout.attention
    heads, size = attention.num_heads, attention.head_dim
    q, k, v = (
        layer.weight.unflatten(0, (heads, size))
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
    )  # [heads, d, D]
    out = attention.out_proj.weight.unflatten(1, (heads, size))  # [D, heads, d]
    probe = torch.einsum("hde,hdf->hef", k, q).flatten(0, 1) / math.sqrt(size)  # [heads D, D]
    weight, bias = readout.query_proj.weight, readout.query_proj.bias
    return {
        "query_weight": torch.cat([weight, probe @ weight]),
        "query_bias": torch.cat([bias, probe @ bias]),
        "mixed_weight": torch.einsum("ohd,hde->ohe", out, v).flatten(1),  # [D, heads D]
    }


def folded_heads(student: Student) -> dict[str, Tensor]:
    """The first layer of each head as the context's columns, all levels in one matrix, and a table
    [C_j, H] for each code before the level."""
    dim, width = student.config.dim, student.config.embedding_dim
    first = [head.blocks[0].linear for head in student.heads]
    tensors = {
        "context_weight": torch.cat([layer.weight[:, :dim] for layer in first]),
        "context_bias": torch.cat([layer.bias for layer in first]),
    }
    for level, layer in enumerate(first):
        for j in range(level):
            columns = layer.weight[:, dim + j * width : dim + (j + 1) * width]
            tensors[f"table_{level}_{j}"] = student.embeddings[j].weight @ columns.T
    return tensors
