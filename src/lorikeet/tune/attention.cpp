// Attention inside each document of a packed row, documents side by side on the threads of a CPU.
//
// attention.py says what is computed and cuts the row into blocks; here every thread takes its own blocks, one after the
// other. A product of a short document is too small to be shared by threads, and two side by side are not.

#if defined(__clang__) || !defined(_OPENMP)
#error "only GCC's OpenMP is the one that torch has: with another, each has threads of its own"
#endif

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using at::Tensor;

// A row of the table that `attention._schedule` makes: what a thread computes at once.
struct Block {
  int64_t thread;
  int64_t head_start, head_stop;  // keys of the start that all documents share
  int64_t own_start, own_stop;    // the document's own keys
  int64_t first, last;            // queries
  int64_t place;                  // weights of a head that are kept before its own, -1 if they are not kept
  int64_t low, high;              // key heads
  int64_t queries() const { return last - first; }
  int64_t head() const { return head_stop - head_start; }
  int64_t keys() const { return head() + own_stop - own_start; }
  // How many keys the query of a row sees, if no window hides the first of them; heads lie one below the other.
  int64_t stop(int64_t row) const { return keys() - queries() + row % queries() + 1; }
};

inline float load(const float* from) { return *from; }
inline float load(const at::BFloat16* from) {
  uint16_t half;
  std::memcpy(&half, from, sizeof half);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline void store(float* to, float value) { *to = value; }
inline void store(at::BFloat16* to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint16_t half = static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
  std::memcpy(to, &half, sizeof half);
}

// e^x for x <= 0: 2^n * 2^f, the second by its series to the sixth power. Relative error: 2e-7 near 0, 4e-6 at -80.
inline float exponential(float x) {
  const float scaled = std::max(x * 1.44269504f, -126.0f);
  const float whole = std::nearbyint(scaled);
  const float f = (scaled - whole) * 0.693147181f;
  const float part = 1.0f + f * (1.0f + f * (0.5f + f * (1.0f / 6 + f * (1.0f / 24 + f * (1.0f / 120 + f * (1.0f / 720))))));
  const int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return part * power;
}

template <typename T>
void softmax(T* scores, int64_t rows, const Block& block, float scale, int64_t window, float* held) {
  const int64_t keys = block.keys();
  for (int64_t row = 0; row < rows; ++row, scores += keys) {
    const int64_t stop = block.stop(row), start = window ? std::max<int64_t>(0, stop - window) : 0;
    float highest = -INFINITY, sum = 0;
#pragma omp simd reduction(max : highest)
    for (int64_t key = start; key < stop; ++key) {
      highest = std::max(highest, held[key] = load(scores + key));
    }
#pragma omp simd reduction(+ : sum)
    for (int64_t key = start; key < stop; ++key) {
      sum += held[key] = exponential(scale * (held[key] - highest));
    }
    const float share = 1 / sum;
    std::memset(static_cast<void*>(scores), 0, start * sizeof(T));
#pragma omp simd
    for (int64_t key = start; key < stop; ++key) {
      store(scores + key, held[key] * share);
    }
    std::memset(static_cast<void*>(scores + stop), 0, (keys - stop) * sizeof(T));
  }
}

// Turn the gradient of the weights into that of the scaled scores, in place.
template <typename T>
void softmax_backward(T* grad, const T* weights, int64_t rows, const Block& block, float scale, int64_t window) {
  const int64_t keys = block.keys();
  for (int64_t row = 0; row < rows; ++row, grad += keys, weights += keys) {
    const int64_t stop = block.stop(row), start = window ? std::max<int64_t>(0, stop - window) : 0;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t key = start; key < stop; ++key) {
      sum += load(grad + key) * load(weights + key);
    }
    std::memset(static_cast<void*>(grad), 0, start * sizeof(T));
#pragma omp simd
    for (int64_t key = start; key < stop; ++key) {
      store(grad + key, scale * load(weights + key) * (load(grad + key) - sum));
    }
    std::memset(static_cast<void*>(grad + stop), 0, (keys - stop) * sizeof(T));
  }
}

// Call `work` with a value of the tensor's type.
template <typename F>
void with_type(const Tensor& tensor, F&& work) {
  tensor.scalar_type() == at::kFloat ? work(float{}) : work(at::BFloat16{});
}

// What every thread computes with: nothing of autograd.
struct Plain {
  at::AutoDispatchBelowADInplaceOrView below;
  at::NoGradGuard none;
};

// A packed row and its blocks.
struct Row {
  std::vector<std::vector<Block>> of_thread;
  int64_t groups, window;
  double scale;

  Row(const Tensor& table, int64_t groups, int64_t window, double scale) : groups(groups), window(window), scale(scale) {
    const auto* blocks = reinterpret_cast<const Block*>(table.const_data_ptr<int64_t>());
    for (int64_t i = 0; i < table.size(0); ++i) {
      of_thread.resize(std::max<size_t>(of_thread.size(), blocks[i].thread + 1));
      of_thread[blocks[i].thread].push_back(blocks[i]);
    }
  }

  template <typename F>
  void each(F&& work) const {
    const int64_t threads = static_cast<int64_t>(of_thread.size());
    at::parallel_for(0, threads, 1, [&](int64_t from, int64_t to) {
      const Plain plain;
      for (int64_t thread = from; thread < to; ++thread) {
        for (const Block& block : of_thread[thread]) {
          work(thread, block);
        }
      }
    });
  }

  // (heads, tokens, size) at a block's heads and queries as (key heads, groups * queries, size), contiguous.
  Tensor stacked(const Tensor& part, const Block& block) const {
    const Tensor some = queries(part, block);
    return some.reshape({block.high - block.low, groups * block.queries(), part.size(2)});
  }

  Tensor queries(const Tensor& part, const Block& block) const {
    return part.slice(0, block.low * groups, block.high * groups).slice(1, block.first, block.last);
  }

  // The keys or values, (key heads, keys, size), of those of the row.
  Tensor pick(const Tensor& all, const Block& block) const {
    const Tensor part = all.slice(0, block.low, block.high), own = part.slice(1, block.own_start, block.own_stop);
    return block.head() ? at::cat({part.slice(1, block.head_start, block.head_stop), own}, 1) : own;
  }

  // Where the block's weights are, (key heads, groups * queries, keys): among those that are kept, or new.
  Tensor room(const Tensor& kept, int64_t heads, const Block& block) const {
    const int64_t count = block.high - block.low, size = groups * block.queries() * block.keys();
    if (block.place < 0) {
      return at::empty({count, groups * block.queries(), block.keys()}, kept.options());
    }
    const int64_t first = heads * block.place + block.low * size;
    return kept.slice(0, first, first + count * size).view({count, groups * block.queries(), block.keys()});
  }

  void weigh(Tensor& weights, const Tensor& q, const Tensor& k, const Block& block) const {
    at::bmm_out(weights, q, k.transpose(1, 2));
    std::vector<float> held(block.keys());
    with_type(weights, [&]<typename T>(T) {
      softmax(weights.mutable_data_ptr<T>(), weights.size(0) * weights.size(1), block, scale, window, held.data());
    });
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& table,
                                   int64_t keeps, double scale, int64_t window) {
  const int64_t heads = query.size(0), groups = heads / key.size(0);
  Tensor out = at::empty_like(query), kept = at::empty({heads * keeps}, query.options());
  const Row row(table, groups, window, scale);
  row.each([&](int64_t, const Block& block) {
    Tensor weights = row.room(kept, heads, block);
    row.weigh(weights, row.stacked(query, block), row.pick(key, block), block);
    Tensor target = row.queries(out, block);
    target.copy_(at::bmm(weights, row.pick(value, block)).view_as(target));
  });
  return {out, kept};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value,
                                            const Tensor& table, const Tensor& kept, double scale, int64_t window, int64_t shared) {
  const int64_t heads = query.size(0), groups = heads / key.size(0);
  Tensor d_query = at::empty_like(query), d_key = at::zeros_like(key), d_value = at::zeros_like(value);
  const Row row(table, groups, window, scale);
  // Keys of the shared start are seen from documents of several threads: each adds up its own, so that the sum repeats.
  const auto threads = static_cast<int64_t>(row.of_thread.size());
  Tensor start_key = at::zeros({threads, key.size(0), shared, key.size(2)}, key.options());
  Tensor start_value = at::zeros_like(start_key);
  row.each([&](int64_t thread, const Block& block) {
    const Tensor q = row.stacked(query, block), k = row.pick(key, block), v = row.pick(value, block);
    const Tensor upper = row.stacked(grad, block);
    Tensor weights = row.room(kept, heads, block);
    if (block.place < 0) {
      row.weigh(weights, q, k, block);
    }
    const auto add = [&](Tensor& total, Tensor& start, const Tensor& part) {
      const Tensor mine = start[thread].slice(0, block.low, block.high);
      const Tensor own = (block.own_start < shared ? mine : total.slice(0, block.low, block.high));
      own.slice(1, block.own_start, block.own_stop).add_(part.slice(1, block.head(), block.keys()));
      if (block.head()) {
        mine.slice(1, block.head_start, block.head_stop).add_(part.slice(1, 0, block.head()));
      }
    };
    add(d_value, start_value, at::bmm(weights.transpose(1, 2), upper));
    Tensor d_scores = at::bmm(upper, v.transpose(1, 2));
    with_type(weights, [&]<typename T>(T) {
      softmax_backward(d_scores.mutable_data_ptr<T>(), weights.const_data_ptr<T>(), d_scores.size(0) * d_scores.size(1), block,
                       scale, window);
    });
    Tensor target = row.queries(d_query, block);
    target.copy_(at::bmm(d_scores, k).view_as(target));
    add(d_key, start_key, at::bmm(d_scores.transpose(1, 2), q));
  });
  if (shared) {
    d_key.slice(1, 0, shared).add_(start_key.sum(0));
    d_value.slice(1, 0, shared).add_(start_value.sum(0));
  }
  return {d_query, d_key, d_value};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lorikeet_cpu, library) {
  library.def("document_attention(Tensor query, Tensor key, Tensor value, Tensor table, int keeps, float scale, int window) -> (Tensor, Tensor)");
  library.def("document_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor table, Tensor kept, float scale, int window, int shared) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(lorikeet_cpu, CPU, library) {
  library.impl("document_attention", forward);
  library.impl("document_attention_backward", backward);
}
