// Attention of new tokens to rows in pages on a CPU: writes their keys and values, then reads each row up to a token's
// own position, page by page, with a running maximum (Milakov and Gimelshein 2018, arXiv:1805.02867).
//
// A token's result is computed in one order, whatever else is in the call; so its bits depend on nothing else.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "vectors.h"

namespace {

using namespace crucible;

constexpr int64_t kQueries = 16;   // that are read against a page together
constexpr int64_t kWidest = 256;   // channels of a head
constexpr int64_t kMostSlots = 64; // of a page
constexpr float kNone = -std::numeric_limits<float>::infinity();

struct Call {
  const float *q, *sinks;  // [T, H, C]; [H] or null
  const float *k, *v;      // [N, Z, K * C], [N, Z, K * E]
  float* out;              // [T, H, E]
  const int32_t *table, *first, *count, *start;  // [R, P], [R], [R], [R]
  int64_t T, H, K, C, E, N, Z, P, R, window, chunk;
  float scale, softcap;
};

// Some tokens of a row and some heads that share a key.
struct Unit {
  int64_t row, head, first_query_head, query_heads, token, tokens;
};

int64_t lowest_seen(const Call& c, int64_t position) {
  int64_t low = 0;
  if (c.window) low = std::max(low, position - c.window + 1);
  if (c.chunk) low = std::max(low, position / c.chunk * c.chunk);
  return low;
}

// The products of a query with the keys of kLanes slots from k on; 0 beyond `slots`.
inline Floats products(const float* q, const float* k, int64_t stride, int64_t slots, int64_t channels) {
  Floats sums[kLanes] = {};
  if (slots >= kLanes) {
    for (int64_t i = 0; i < channels; i += kLanes) {
      Floats of_q = load(q + i);
      for (int z = 0; z < kLanes; z++) sums[z] = fma(of_q, load(k + z * stride + i), sums[z]);
    }
  } else {
    for (int64_t z = 0; z < slots; z++)
      for (int64_t i = 0; i < channels; i += kLanes) sums[z] = fma(load(q + i), load(k + z * stride + i), sums[z]);
  }
  return totals(sums);
}

void attend(const Call& c, const Unit& u) {
  int64_t n = u.tokens * u.query_heads;
  alignas(64) float q[kQueries * kWidest], sum[kQueries * kWidest], scores[kMostSlots];
  float most[kQueries], weight[kQueries];
  auto head_of = [&](int64_t j) { return u.first_query_head + j % u.query_heads; };
  auto token_of = [&](int64_t j) { return c.first[u.row] + u.token + j / u.query_heads; };
  auto position_of = [&](int64_t j) { return c.start[u.row] + u.token + j / u.query_heads; };
  for (int64_t j = 0; j < n; j++) {
    const float* from = c.q + (token_of(j) * c.H + head_of(j)) * c.C;
    for (int64_t i = 0; i < c.C; i++) q[j * c.C + i] = from[i] * c.scale;
    std::fill_n(sum + j * c.E, c.E, 0.0f);
    most[j] = c.sinks ? c.sinks[head_of(j)] : kNone;
    weight[j] = c.sinks ? 1.0f : 0.0f;
  }
  int64_t last = std::min(position_of(n - 1), c.P * c.Z - 1);
  for (int64_t page = lowest_seen(c, position_of(0)) / c.Z; page <= last / c.Z; page++) {
    int64_t at = std::clamp<int64_t>(c.table[u.row * c.P + page], 0, c.N - 1) * c.Z;
    const float* k = c.k + at * c.K * c.C + u.head * c.C;
    const float* v = c.v + at * c.K * c.E + u.head * c.E;
    for (int64_t j = 0; j < n; j++) {
      int64_t low = std::max(lowest_seen(c, position_of(j)) - page * c.Z, int64_t{0});
      int64_t high = std::min(position_of(j) - page * c.Z + 1, c.Z);
      if (low >= high) continue;
      Floats top = all(kNone);
      for (int64_t z = 0; z < c.Z; z += kLanes) {
        Floats some = all(kNone);
        if (z < high && z + kLanes > low) {
          some = products(q + j * c.C, k + z * c.K * c.C, c.K * c.C, c.Z - z, c.C);
          if (c.softcap)
            for (int i = 0; i < kLanes; i++) some[i] = c.softcap * std::tanh(some[i] / c.softcap);
          for (int i = 0; i < kLanes; i++)
            if (z + i < low || z + i >= high) some[i] = kNone;
        }
        store(scores + z, some);
        top = larger(top, some);
      }
      float new_most = std::max(most[j], largest(top));
      if (new_most == kNone) continue;  // every score is minus infinity
      float kept = exponential(all(most[j] - new_most))[0];
      Floats added = {};
      for (int64_t z = 0; z < c.Z; z += kLanes) {
        Floats p = exponential(load(scores + z) - new_most);
        store(scores + z, p);
        added += p;
      }
      most[j] = new_most;
      weight[j] = weight[j] * kept + total(added);
      for (int64_t e = 0; e < c.E; e += kLanes) {
        Floats s = load(sum + j * c.E + e) * kept;
        for (int64_t z = low; z < high; z++) s = fma(all(scores[z]), load(v + z * c.K * c.E + e), s);
        store(sum + j * c.E + e, s);
      }
    }
  }
  for (int64_t j = 0; j < n; j++) {
    float* to = c.out + (token_of(j) * c.H + head_of(j)) * c.E;
    for (int64_t e = 0; e < c.E; e += kLanes) store(to + e, load(sum + j * c.E + e) / weight[j]);
  }
}

void write(const Call& c, const float* from, float* pages, int64_t width) {
  for (int64_t r = 0; r < c.R; r++) {
    for (int64_t i = 0; i < c.count[r]; i++) {
      int64_t position = c.start[r] + i, token = c.first[r] + i;
      if (position < 0 || position >= c.P * c.Z || token < 0 || token >= c.T) continue;
      int64_t page = c.table[r * c.P + position / c.Z];
      if (page < 0 || page >= c.N) continue;
      std::memcpy(pages + (page * c.Z + position % c.Z) * width, from + token * width, width * sizeof(float));
    }
  }
}

using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;

// q [T, H, C]; new_k [T, K * C] and new_v [T, K * E], or [0]; k and v: pages, which are the results' memory too
ffi::Error paged(ffi::ThreadPool pool, int64_t heads, float scale, float softcap, int64_t window, int64_t chunk, F32 q,
                 F32 new_k, F32 new_v, F32 k, F32 v, S32 table, S32 first, S32 count, S32 start, F32 sinks,
                 ffi::ResultBuffer<ffi::F32> out, ffi::ResultBuffer<ffi::F32> k_out,
                 ffi::ResultBuffer<ffi::F32> v_out) {
  Call c;
  c.T = q.dimensions()[0], c.H = q.dimensions()[1], c.C = q.dimensions()[2], c.K = heads;
  c.N = k.dimensions()[0], c.Z = k.dimensions()[1], c.E = v.dimensions()[2] / heads;
  c.R = table.dimensions()[0], c.P = table.dimensions()[1];
  if (k.dimensions()[2] != c.K * c.C || v.dimensions()[2] != c.K * c.E || c.H % c.K || c.C % kLanes || c.E % kLanes ||
      c.C > kWidest || c.E > kWidest || c.Z > kMostSlots)
    return ffi::Error::InvalidArgument("these heads and pages are not supported");
  if (k_out->typed_data() != k.typed_data()) std::memcpy(k_out->typed_data(), k.typed_data(), k.size_bytes());
  if (v_out->typed_data() != v.typed_data()) std::memcpy(v_out->typed_data(), v.typed_data(), v.size_bytes());
  c.q = q.typed_data(), c.k = k_out->typed_data(), c.v = v_out->typed_data(), c.out = out->typed_data();
  c.sinks = sinks.element_count() ? sinks.typed_data() : nullptr;
  c.table = table.typed_data(), c.first = first.typed_data(), c.count = count.typed_data();
  c.start = start.typed_data();
  c.window = window, c.chunk = chunk, c.scale = scale, c.softcap = softcap;
  for (int64_t r = 0; r < c.R; r++)
    if (c.count[r] > 0 && (c.first[r] < 0 || c.first[r] + c.count[r] > c.T || c.start[r] < 0))
      return ffi::Error::InvalidArgument("a row's tokens are not among those of the call");
  if (new_k.element_count()) {
    write(c, new_k.typed_data(), k_out->typed_data(), c.K * c.C);
    write(c, new_v.typed_data(), v_out->typed_data(), c.K * c.E);
  }
  std::memset(c.out, 0, out->size_bytes());
  std::vector<Unit> units;
  int64_t work = 0, per_key = c.H / c.K, group = std::min(per_key, kQueries), tokens = std::max<int64_t>(1, kQueries / group);
  for (int64_t r = 0; r < c.R; r++) {
    for (int64_t t = 0; t < c.count[r]; t += tokens) {
      int64_t some = std::min<int64_t>(tokens, c.count[r] - t), end = c.start[r] + t + some;
      work += some * c.H * (end - lowest_seen(c, end - some)) * (c.C + c.E);
      for (int64_t head = 0; head < c.K; head++)
        for (int64_t g = 0; g < per_key; g += group)
          units.push_back({r, head, head * per_key + g, std::min(group, per_key - g), t, some});
    }
  }
  if (units.empty()) return ffi::Error::Success();
  in_parallel(pool, units.size(), work / (int64_t)units.size(), [&](int64_t i) { attend(c, units[i]); });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(crucible_paged, paged,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("heads")
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("chunk")
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<F32>()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Arg<F32>()
                                  .Ret<F32>()
                                  .Ret<F32>()
                                  .Ret<F32>());
