// attention_mass: sum over the chosen queries of exp(logits / T - logsumexp), per head and cell.
//
// Only the chosen queries enter the products. If logsumexp is not given, an additional pass over the tiles computes it
// (attention_forward.h without values). Cells that no query attends to are set to 0 and not read.
#include "attention/attention_call.h"
#include "attention/attention_forward.h"

namespace fastkd {
namespace attention_mass {

struct Table {  // for float, double
  attention::Step prepare, forward, merge;  // attention_forward.h
  attention::Step mass;                     // index: split
  int64_t (*scratch)(const attention::Call&);
};

}  // namespace attention_mass
}  // namespace fastkd

#if FASTKD_COMPILES_KERNELS
FASTKD_KERNELS_BEGIN
namespace fastkd {
namespace {
using namespace attention_mass;

template <class acc>
struct Mass {
  using V = Vector<acc>;
  using F = Forward<acc, false>;

  static void mass(const Call& call, int64_t index, void* scratch) {
    const Split& split = call.splits[index];
    const Buffers<acc> buffers(call, scratch);
    Tile tile;
    Lines next;
    const auto visit = [&](const Tile&) __attribute__((always_inline)) {
      if (call.count(split.image) > 0) F::load_cells(call, buffers, tile, split.image, false);
      for (int64_t head = 0; head < call.heads; ++head) {
        F::foresee(call, tile, split.image, head, next);
        if (call.projected) tile_keys(call, buffers, tile, head, next);
        acc total[kTile] = {};
        F::each_chunk(call, call.count(split.image), [&](int64_t first, int64_t count) __attribute__((always_inline)) {
          const acc* logits = F::logits_of(call, buffers, tile, split.image, head, first, count, next);
          add_probabilities(call, buffers, tile, split.image, head, first, count, logits, total);
        });
        store_mass(call, tile, split.image, head, total);
      }
    };
    each_tile(call, split, tile, visit, [&](const attention::Level& level, int64_t cell, int64_t length) {
      store_zeros<acc>(level, split.image, call.heads, cell, length);
    });
  }

  static void add_probabilities(const Call& call, const Buffers<acc>& buffers, const Tile& tile, int64_t image,
                                int64_t head, int64_t first, int64_t count, const acc* logits, acc* total) {
    const int64_t length = round_up(tile.cells, kLanes<V>);
    const V scale = splat<V>(static_cast<acc>(call.scale));
    const auto row_of = [&](int64_t n) { return call.row(image, head, first + n); };
    F::each_rows(tile, buffers, count, row_of, [&](int64_t begin, int64_t rows) __attribute__((always_inline)) {
      for (int64_t i = 0; i < length; i += kLanes<V>) {
        V sum = load<V>(total + i);
        for (int64_t n = 0; n < rows; ++n) {
          const V base = splat<V>(static_cast<const acc*>(call.logsumexp)[row_of(begin + n)]);
          const V logit = (load<V>(logits + (begin + n) * kTile + i) + load<V>(buffers.bias + n * kTile + i)) * scale;
          sum += exponential(logit - base);
        }
        store(total + i, sum);
      }
    });
  }

  static void store_mass(const Call& call, const Tile& tile, int64_t image, int64_t head, const acc* total) {
    for (int64_t each = 0; each < tile.run_count; ++each) {
      const Run& run = tile.runs[each];
      const int64_t cells = run.level->rows * run.level->columns;
      acc* out = static_cast<acc*>(run.level->out) + (image * call.heads + head) * cells + run.cell;
      std::memcpy(out, total + run.offset, run.length * sizeof(acc));
    }
  }

  static constexpr Table table() { return {F::prepare, F::forward, F::merge, mass, F::scratch}; }
};

}  // namespace
}  // namespace fastkd
FASTKD_KERNELS_END

FASTKD_KERNEL_TABLES(attention_mass::Table, Mass, float, double)
#endif  // FASTKD_COMPILES_KERNELS

#if FASTKD_GENERIC_PASS
namespace fastkd {
namespace {
using attention::Arguments;

// The table rows of the chosen queries, and their number per image.
struct Chosen {
  std::vector<int64_t> rows, count;
  Chosen(const attention::Call& call, const Tensor& chosen)
      : rows(call.images * call.heads * call.queries), count(call.images) {
    STD_TORCH_CHECK(chosen.dim() == 2 && chosen.size(0) == call.images && chosen.size(1) == call.queries &&
                        chosen.scalar_type() == ScalarType::Bool && chosen.is_cpu(),
                    "attention_mass: chosen must be [B, N] bool on the CPU");
    const Tensor plain = torch::stable::contiguous(chosen);
    const bool* flags = plain.const_data_ptr<bool>();
    for (int64_t image = 0; image < call.images; ++image)
      for (int64_t query = 0; query < call.queries; ++query) {
        if (!flags[image * call.queries + query]) continue;
        for (int64_t head = 0; head < call.heads; ++head)
          rows[(image * call.heads + head) * call.queries + count[image]] = head * call.queries + query;
        ++count[image];
      }
  }
};

std::vector<Tensor> mass(Tensor queries, std::vector<Tensor> levels, std::optional<Tensor> key_weight,
                         std::vector<Tensor> row_bias, std::vector<Tensor> column_bias, Tensor chosen,
                         std::optional<Tensor> logsumexp, double temperature) {
  Arguments arguments("attention_mass", queries, levels, key_weight, row_bias, column_bias, nullptr);
  const Table& table = kernels_for<Table>(queries);
  attention::Call& call = arguments.call;
  const Chosen used(call, chosen);
  call.chosen = used.rows.data();
  call.chosen_count = used.count.data();
  call.scale = 1 / temperature;
  std::vector<Tensor> masses;
  for (attention::Level& level : arguments.levels) {
    masses.push_back(arguments.make({call.images, call.heads, level.rows, level.columns}));
    level.out = masses.back().mutable_data_ptr();
  }
  arguments.prepare(table.prepare);
  if (logsumexp.has_value()) {
    // Written if not given, else only read.
    call.logsumexp =
        const_cast<void*>(arguments.small(*logsumexp, {call.images, call.heads, call.queries}, "logsumexp"));
  } else {
    call.logsumexp = arguments.allocate(call.images * call.heads * call.queries);
    arguments.allocate_sums(call.heads * call.queries * 2, 0);
    arguments.run(table.forward, call.split_count, 1, table.scratch(call));
    arguments.run(table.merge, call.images * call.heads, 1, 0);
  }
  arguments.run(table.mass, call.split_count, 1, table.scratch(call));
  return masses;
}

}  // namespace

FASTKD_OP("attention_mass",
          "(Tensor queries, Tensor[] levels, Tensor? key_weight, Tensor[] row_bias, Tensor[] column_bias, Tensor "
          "chosen, Tensor? logsumexp, float temperature) -> Tensor[]",
          mass)

}  // namespace fastkd
#endif  // FASTKD_GENERIC_PASS
