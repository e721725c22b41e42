// Beam search over the trie: context vectors -> items, all levels.
//
// A block of requests shares the first layer (every head's context part) and level 1; then each
// request descends alone. At levels >= 2 of "children" mode only children's logits exist, an only
// child has log-probability 0 and needs no head, and as log-probabilities are <= 0, a beam that
// scores below the num_beams-th candidate so far ends the level .

namespace {

constexpr int kChunk = 8;  // beams whose heads are computed together where that shares weights

struct Beams {
  int count;
  float* score;    // [num_beams], best first
  int32_t* node;   // [num_beams], node of the current level
  int16_t* codes;  // [num_beams, kMaxLevels]
};

struct DecodeScratch {
  float* first;         // [kMaxBlock, L * Hp]: context part of every head's first layer
  float* hidden;        // [kMaxBlock, Hp]
  float* next;          // [kMaxBlock, Hp]
  float* logits;        // [kMaxBlock, logit_stride]
  float* child_logits;  // [logit_stride]
  int64_t logit_stride;
  BeamKey* keys;
  Beams beams, survivors;
};

inline DecodeScratch make_scratch(const HeadsView& heads, const DecodeConfig& config,
                                  Arena& arena) {
  const int64_t hidden_pad = padded(heads.hidden_dim);
  auto floats = [&](int64_t n) { return static_cast<float*>(arena.take(n * sizeof(float))); };
  auto beams = [&] {
    Beams b;
    b.count = 0;
    b.score = floats(config.num_beams);
    b.node = static_cast<int32_t*>(arena.take(config.num_beams * sizeof(int32_t)));
    b.codes = static_cast<int16_t*>(
        arena.take(static_cast<size_t>(config.num_beams) * kMaxLevels * sizeof(int16_t)));
    return b;
  };
  DecodeScratch scratch;
  int64_t widest = 0;
  for (int l = 0; l < heads.num_levels; ++l)
    widest = heads.heads[l].num_codes > widest ? heads.heads[l].num_codes : widest;
  scratch.logit_stride = padded(widest);
  scratch.first = floats(kMaxBlock * heads.num_levels * hidden_pad);
  scratch.hidden = floats(kMaxBlock * hidden_pad);
  scratch.next = floats(kMaxBlock * hidden_pad);
  scratch.logits = floats(kMaxBlock * scratch.logit_stride);
  scratch.child_logits = floats(scratch.logit_stride);
  scratch.keys =
      static_cast<BeamKey*>(arena.take(selector_capacity(config.num_beams) * sizeof(BeamKey)));
  scratch.beams = beams();
  scratch.survivors = beams();
  return scratch;
}

// Blocks 1.. of a head, after the first layer's LayerNorm and GELU: returns where the result lies
// (hidden or next).
template <class W>
float* further_blocks(const HeadsView& heads, const HeadView& head, int64_t rows, float* hidden,
                      float* next) {
  const int64_t hidden_pad = padded(heads.hidden_dim);
  const auto* weight = static_cast<const typename W::Storage*>(head.block_weight);
  for (int block = 1; block < heads.num_blocks; ++block) {
    const float* vectors = head.vectors + (3 * block - 1) * hidden_pad;  // bias, gain, shift
    fill_rows(next, hidden_pad, rows, vectors, hidden_pad);
    gemm_accumulate<W>(rows, heads.hidden_dim, hidden_pad, hidden, hidden_pad,
                       weight + (block - 1) * heads.hidden_dim * hidden_pad, hidden_pad, next,
                       hidden_pad);
    for (int64_t m = 0; m < rows; ++m) {
      layer_norm<Gelu<W>>(next + m * hidden_pad, heads.hidden_dim, heads.layer_norm_eps,
                          vectors + hidden_pad, vectors + 2 * hidden_pad);
    }
    float* swap = hidden;
    hidden = next;
    next = swap;
  }
  return hidden;
}

// hidden <- GELU(LN(first + sum_j P_{l,j}[c_j])), the first layer of level index `level` for one
// prefix.
template <class W>
void first_layer(const HeadsView& heads, int level, const float* first, const int16_t* codes,
                 float* hidden) {
  const HeadView& head = heads.heads[level];
  const int64_t hidden_pad = padded(heads.hidden_dim);
  const auto* table = static_cast<const typename W::Storage*>(head.prefix_table);
  const typename W::Storage* rows[kMaxLevels];
  int64_t offset = 0;
  for (int j = 0; j < level; ++j) {
    rows[j] = table + (offset + codes[j]) * hidden_pad;
    offset += heads.heads[j].num_codes;
  }
  for (int64_t i = 0; i < hidden_pad; i += kLane) {
    Vec z = vec_load(first + i);
    for (int j = 0; j < level; ++j) z = vec_add(z, W::load(rows[j] + i));
    vec_store(hidden + i, z);
  }
  layer_norm<Gelu<W>>(hidden, heads.hidden_dim, heads.layer_norm_eps, head.vectors,
                      head.vectors + hidden_pad);
}

inline bool excluded(const ExcludeView& exclude, int64_t request, int64_t item) {
  int64_t low = exclude.offsets[request], high = exclude.offsets[request + 1];
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (exclude.ids[middle] < item) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < exclude.offsets[request + 1] && exclude.ids[low] == item;
}

// Item slot may be recommended to this request.
inline bool allowed(const TrieView& trie, const ExcludeView& exclude, int64_t request,
                    int32_t slot) {
  if (!trie.leaf_available[slot]) return false;
  return exclude.ids == nullptr || !excluded(exclude, request, trie.leaf_item_ids[slot]);
}

inline bool leaf_allowed(const TrieView& trie, const ExcludeView& exclude, int64_t request,
                         int32_t leaf) {
  for (int32_t slot = trie.leaf_begin[leaf]; slot < trie.leaf_begin[leaf + 1]; ++slot) {
    if (allowed(trie, exclude, request, slot)) return true;
  }
  return false;
}

// One request at one level: candidates of its beams go to the selector.
struct Expansion {
  const HeadsView& heads;
  const TrieView& trie;
  const DecodeConfig& config;
  const ExcludeView& exclude;
  int64_t request;
  int level;
  DecodeScratch& scratch;
  BeamSelector& selector;
  bool finite = true;

  bool last() const { return level + 1 == heads.num_levels; }
  bool over_all_codes() const { return config.codebook || level == 0; }

  void offer(float score, uint32_t rank, uint32_t ordinal, int32_t child) {
    if (!(score >= -kLargestFinite && score <= kLargestFinite)) {  // NaN fails both
      finite = false;
      return;
    }
    const BeamKey key = make_beam_key(score, rank, ordinal);
    if (key <= selector.threshold()) return;
    if (last() && !leaf_allowed(trie, exclude, request, child)) return;
    selector.push(key);
  }

  // Scores the children of one beam. `logits` holds every code's logit (all_codes) or the
  // children's in sibling order.
  void offer_children(uint32_t rank, float parent_score, int32_t begin, int32_t end, float* logits,
                      bool all_codes) {
    const int64_t num_codes = heads.heads[level].num_codes, children = end - begin;
    const int16_t* codes = trie.codes[level] + begin;
    const float temperature = config.temperature[level], weight = config.level_weight[level];
    float* child_logits = logits;
    if (all_codes) {
      child_logits = scratch.child_logits;
      for (int64_t i = 0; i < children; ++i) child_logits[i] = logits[codes[i]];
    }
    float* normalised = over_all_codes() ? logits : child_logits;
    const int64_t width = over_all_codes() ? num_codes : children;
    if (!all_finite(normalised, width)) {
      finite = false;
      return;
    }
    if (temperature != 1.0f) {
      for (int64_t i = 0; i < width; ++i) normalised[i] /= temperature;
      if (normalised != child_logits) {
        for (int64_t i = 0; i < children; ++i) child_logits[i] /= temperature;
      }
    }
    float largest, total;
    softmax_statistics(normalised, width, &largest, &total);
    const float log_total = logf(total);
    for (int64_t i = 0; i < children; ++i) {
      float log_probability = (child_logits[i] - largest) - log_total;
      if (log_probability < -kLargestFinite) log_probability = -kLargestFinite;
      offer(parent_score + weight * log_probability, rank, static_cast<uint32_t>(i),
            begin + static_cast<int32_t>(i));
    }
  }
};

template <class W>
void expand_level(Expansion& expansion, const float* first) {
  const HeadsView& heads = expansion.heads;
  const DecodeConfig& config = expansion.config;
  DecodeScratch& scratch = expansion.scratch;
  const int level = expansion.level;
  const HeadView& head = heads.heads[level];
  const auto* out_weight = static_cast<const typename W::Storage*>(head.out_weight);
  const int64_t hidden_pad = padded(heads.hidden_dim);
  const bool dense = config.codebook || config.level_mode[level] == LevelMode::kDense;
  const int chunk = dense || heads.num_blocks > 1 ? kChunk : 1;
  const bool bounded = config.level_weight[level] >= 0.0f;
  const Beams& beams = scratch.beams;
  const int32_t* child_begin = expansion.trie.child_begin[level];

  int ranks[kChunk];
  int waiting = 0;
  auto flush = [&] {
    const float* hidden = further_blocks<W>(heads, head, waiting, scratch.hidden, scratch.next);
    if (dense) {
      dot_matrix<W>(waiting, hidden_pad, head.num_codes, hidden, hidden_pad, out_weight, hidden_pad,
                    scratch.logits, scratch.logit_stride);
    }
    for (int i = 0; i < waiting; ++i) {
      const int rank = ranks[i];
      const int32_t begin = child_begin[beams.node[rank]], end = child_begin[beams.node[rank] + 1];
      float* logits = scratch.logits + i * scratch.logit_stride;
      if (dense) {
        for (int c = 0; c < head.num_codes; ++c) logits[c] += head.out_bias[c];
      } else {
        const int16_t* codes = expansion.trie.codes[level] + begin;
        dot_rows<W>(
            hidden_pad, hidden + i * hidden_pad, out_weight, hidden_pad, end - begin,
            [codes](int j) { return static_cast<int64_t>(codes[j]); }, logits);
        for (int32_t j = 0; j < end - begin; ++j) logits[j] += head.out_bias[codes[j]];
      }
      expansion.offer_children(static_cast<uint32_t>(rank), beams.score[rank], begin, end, logits,
                               dense);
    }
    waiting = 0;
  };

  for (int rank = 0; rank < beams.count && expansion.finite; ++rank) {
    const float score = beams.score[rank];
    if (bounded &&
        make_beam_key(score, static_cast<uint32_t>(rank), 0) <= expansion.selector.threshold())
      break;
    const int32_t begin = child_begin[beams.node[rank]], end = child_begin[beams.node[rank] + 1];
    if (end - begin == 1 && !expansion.over_all_codes()) {
      expansion.offer(score, static_cast<uint32_t>(rank), 0, begin);  // an only child: log 1 = 0
      continue;
    }
    first_layer<W>(heads, level, first, beams.codes + rank * kMaxLevels,
                   scratch.hidden + waiting * hidden_pad);
    ranks[waiting++] = rank;
    if (waiting == chunk) flush();
  }
  if (waiting > 0 && expansion.finite) flush();
}

// The selector's keys become the beams of the next level.
inline void advance(Expansion& expansion, int num_survivors) {
  DecodeScratch& scratch = expansion.scratch;
  const Beams& from = scratch.beams;
  Beams& to = scratch.survivors;
  const int level = expansion.level;
  for (int i = 0; i < num_survivors; ++i) {
    const BeamKey key = expansion.selector.keys()[i];
    const uint32_t rank = key_parent_rank(key);
    const int32_t parent = from.node[rank];
    const int32_t child =
        expansion.trie.child_begin[level][parent] + static_cast<int32_t>(key_ordinal(key));
    to.score[i] = key_score(key);
    to.node[i] = child;
    for (int j = 0; j < level; ++j)
      to.codes[i * kMaxLevels + j] = from.codes[rank * kMaxLevels + j];
    to.codes[i * kMaxLevels + level] = expansion.trie.codes[level][child];
  }
  to.count = num_survivors;
  Beams swap = scratch.beams;
  scratch.beams = scratch.survivors;
  scratch.survivors = swap;
}

// Leaves become items, in catalogue order inside a leaf; the rest of the request's row is padding.
inline void write_result(const TrieView& trie, const DecodeConfig& config,
                         const ExcludeView& exclude, int64_t request, const Beams& leaves,
                         const ResultView& result) {
  const int levels = trie.num_levels;
  int64_t* items = result.items + request * config.k;
  float* scores = result.scores + request * config.k;
  int32_t* codes = result.codes + request * config.k * levels;
  int count = 0;
  for (int i = 0; i < leaves.count && count < config.k; ++i) {
    const int32_t leaf = leaves.node[i];
    for (int32_t slot = trie.leaf_begin[leaf]; slot < trie.leaf_begin[leaf + 1] && count < config.k;
         ++slot) {
      if (!allowed(trie, exclude, request, slot)) continue;
      items[count] = trie.leaf_item_ids[slot];
      scores[count] = leaves.score[i];
      for (int j = 0; j < levels; ++j) codes[count * levels + j] = leaves.codes[i * kMaxLevels + j];
      ++count;
    }
  }
  result.counts[request] = count;
  for (; count < config.k; ++count) {
    items[count] = -1;
    scores[count] = -__builtin_inff();
    for (int j = 0; j < levels; ++j) codes[count * levels + j] = -1;
  }
}

template <class W>
void beam_block(const HeadsView& heads, const TrieView& trie, const DecodeConfig& config,
                const ExcludeView& exclude, int64_t begin, int64_t end, const float* context,
                int64_t context_stride, const ResultView& result, Arena& arena) {
  using Storage = typename W::Storage;
  const int64_t rows = end - begin, hidden_pad = padded(heads.hidden_dim);
  const int64_t first_stride = heads.num_levels * hidden_pad;
  DecodeScratch scratch = make_scratch(heads, config, arena);
  BeamSelector selector(scratch.keys, config.num_beams);

  fill_rows(scratch.first, first_stride, rows, heads.context_bias, first_stride);
  gemm_accumulate<W>(rows, heads.dim, first_stride, context, context_stride,
                     static_cast<const Storage*>(heads.context_weight), first_stride, scratch.first,
                     first_stride);

  // Level 1 needs every logit of every request: one matrix product for the block.
  const HeadView& root_head = heads.heads[0];
  for (int64_t m = 0; m < rows; ++m) {
    first_layer<W>(heads, 0, scratch.first + m * first_stride, nullptr,
                   scratch.hidden + m * hidden_pad);
  }
  const float* hidden = further_blocks<W>(heads, root_head, rows, scratch.hidden, scratch.next);
  float* root_logits = scratch.logits;
  dot_matrix<W>(rows, hidden_pad, root_head.num_codes, hidden, hidden_pad,
                static_cast<const Storage*>(root_head.out_weight), hidden_pad, root_logits,
                scratch.logit_stride);
  // Requests descend one by one and reuse scratch.logits, so the block's level-1 rows are kept
  // apart.
  float* kept = static_cast<float*>(arena.take(kMaxBlock * scratch.logit_stride * sizeof(float)));
  memcpy(kept, root_logits, rows * scratch.logit_stride * sizeof(float));

  for (int64_t m = 0; m < rows; ++m) {
    const int64_t request = begin + m;
    const float* first = scratch.first + m * first_stride;
    bool finite = all_finite(context + m * context_stride, heads.dim);
    scratch.beams.count = 1;
    scratch.beams.score[0] = 0.0f;
    scratch.beams.node[0] = 0;
    for (int level = 0; level < heads.num_levels && finite; ++level) {
      selector.clear();
      Expansion expansion{heads, trie, config, exclude, request, level, scratch, selector};
      if (level == 0) {
        float* logits = kept + m * scratch.logit_stride;
        for (int c = 0; c < root_head.num_codes; ++c) logits[c] += root_head.out_bias[c];
        expansion.offer_children(0, 0.0f, 0, trie.num_nodes[0], logits, true);
      } else {
        expand_level<W>(expansion, first + level * hidden_pad);
      }
      finite = expansion.finite;
      if (finite) advance(expansion, selector.finish());
    }
    if (!finite) scratch.beams.count = 0;
    write_result(trie, config, exclude, request, scratch.beams, result);
  }
}

void beam_decode(const HeadsView& heads, const TrieView& trie, const DecodeConfig& config,
                 const ExcludeView& exclude, int64_t begin, int64_t end, const float* context,
                 int64_t context_stride, const ResultView& result, Arena& arena) {
  switch (heads.dtype) {
    case DType::kFloat32:
      return beam_block<Float32>(heads, trie, config, exclude, begin, end, context, context_stride,
                                 result, arena);
    case DType::kBFloat16:
      return beam_block<BFloat16>(heads, trie, config, exclude, begin, end, context, context_stride,
                                  result, arena);
    case DType::kFloat16:
      return beam_block<Float16>(heads, trie, config, exclude, begin, end, context, context_stride,
                                 result, arena);
  }
}

template <class W>
void logits_block(const HeadsView& heads, int level, int64_t rows, const float* context,
                  int64_t context_stride, const int32_t* prefix_codes, float* logits,
                  Arena& arena) {
  using Storage = typename W::Storage;
  const HeadView& head = heads.heads[level];
  const int64_t hidden_pad = padded(heads.hidden_dim), logit_stride = padded(head.num_codes);
  const int64_t first_stride = heads.num_levels * hidden_pad;
  auto take = [&](int64_t n) { return static_cast<float*>(arena.take(n * sizeof(float))); };
  float* hidden = take(kMaxBlock * hidden_pad);
  float* next = take(kMaxBlock * hidden_pad);
  float* padded_logits = take(kMaxBlock * logit_stride);

  fill_rows(next, hidden_pad, rows, heads.context_bias + level * hidden_pad, hidden_pad);
  gemm_accumulate<W>(rows, heads.dim, hidden_pad, context, context_stride,
                     static_cast<const Storage*>(heads.context_weight) + level * hidden_pad,
                     first_stride, next, hidden_pad);
  for (int64_t m = 0; m < rows; ++m) {
    int16_t codes[kMaxLevels];
    for (int j = 0; j < level; ++j) codes[j] = static_cast<int16_t>(prefix_codes[m * level + j]);
    first_layer<W>(heads, level, next + m * hidden_pad, codes, hidden + m * hidden_pad);
  }
  const float* top = further_blocks<W>(heads, head, rows, hidden, next);
  dot_matrix<W>(rows, hidden_pad, head.num_codes, top, hidden_pad,
                static_cast<const Storage*>(head.out_weight), hidden_pad, padded_logits,
                logit_stride);
  for (int64_t m = 0; m < rows; ++m) {
    for (int c = 0; c < head.num_codes; ++c) {
      logits[m * head.num_codes + c] = padded_logits[m * logit_stride + c] + head.out_bias[c];
    }
  }
}

void level_logits(const HeadsView& heads, int level, int64_t rows, const float* context,
                  int64_t context_stride, const int32_t* prefix_codes, float* logits,
                  Arena& arena) {
  switch (heads.dtype) {
    case DType::kFloat32:
      return logits_block<Float32>(heads, level, rows, context, context_stride, prefix_codes,
                                   logits, arena);
    case DType::kBFloat16:
      return logits_block<BFloat16>(heads, level, rows, context, context_stride, prefix_codes,
                                    logits, arena);
    case DType::kFloat16:
      return logits_block<Float16>(heads, level, rows, context, context_stride, prefix_codes,
                                   logits, arena);
  }
}

}  // namespace
