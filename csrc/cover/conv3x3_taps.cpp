// Calls of the kernels of conv3x3_taps_kernels.h.
#include "cover/conv3x3_taps_kernels.h"
#include "common/call.h"

#include <array>
#include <memory>

#if FASTKD_COMPILES_KERNELS
FASTKD_KERNEL_TABLES(conv3x3_taps::Table, Taps, float, double)
#endif  // FASTKD_COMPILES_KERNELS

#if FASTKD_GENERIC_PASS
namespace fastkd {
namespace {
using namespace conv3x3_taps;

constexpr int64_t kMostEmbeddings = 512;  // above this, the library product is faster in spite of its copy

Tensor shaped(const Tensor& tensor, std::vector<int64_t> shape) {
  return torch::stable::view(tensor, torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()));
}

// out = first second. Not matmul, which would be cast by autocast if the backward pass runs under it.
void multiply_into(const Tensor& first, const Tensor& second, const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(first), from(second), from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

// The product of first^T [C, N] and second [N, D], block by block of rows and then added up: one sum over thousands of
// embeddings is less exact than plain torch's, which adds them up in the cells of a level first.
Tensor multiply_transposed(Tensor first, Tensor second) {
  Tensor total;
  for (int64_t begin = 0; begin < first.size(0); begin += kMostEmbeddings) {
    const int64_t count = std::min(kMostEmbeddings, first.size(0) - begin);
    const Tensor rows = torch::stable::narrow(first, 0, begin, count);
    const Tensor part = new_tensor(first, {first.size(1), second.size(1)});
    multiply_into(torch::stable::transpose(rows, 0, 1), torch::stable::narrow(second, 0, begin, count), part);
    total = begin == 0 ? part : torch::stable::subtract(total, part, -1.0);
  }
  return total;
}

// A call: its dense arguments, the embeddings packed for the products, and the tasks.
struct Call {
  Tensor weight, embeddings;
  std::vector<Tensor> scratch;
  const Table& table;
  Arguments arguments{};

  Call(const Tensor& given, const Tensor& given_weight)
      : weight(given_weight), embeddings(given), table(kernels_for<Table>(given)) {
    STD_TORCH_CHECK(given.dim() == 2 && given_weight.dim() == 4 && given.is_cpu() && given_weight.is_cpu() &&
                        given_weight.size(1) == given.size(1) && given_weight.size(2) == 3 && given_weight.size(3) == 3,
                    "conv3x3_taps: embeddings must be [N, C] and weight [O, C, 3, 3], both on the CPU");
    STD_TORCH_CHECK(widened(given) == given.scalar_type() && given_weight.scalar_type() == given.scalar_type(),
                    "conv3x3_taps: embeddings and weight must both be float32 or float64");
    weight = torch::stable::contiguous(given_weight);
    embeddings = torch::stable::contiguous(given);
    const int64_t lanes = table.lanes;
    arguments.count = given.size(0), arguments.inputs = given.size(1), arguments.outputs = given_weight.size(0);
    arguments.padded = (arguments.count + lanes - 1) / lanes * lanes;
    arguments.weight = weight.const_data_ptr();
  }

  void* room(std::vector<int64_t> shape) {
    scratch.push_back(new_tensor(embeddings, shape));
    return scratch.back().mutable_data_ptr();
  }

  void pack_columns() {
    void* columns = room({arguments.inputs, arguments.padded});
    table.pack(arguments, embeddings.const_data_ptr(), nullptr, columns);
    arguments.columns = columns;
  }

  void pack_rows() {  // not needed if rows are whole vectors
    const int64_t lanes = table.lanes, width = (arguments.inputs + lanes - 1) / lanes * lanes;
    arguments.rows = embeddings.const_data_ptr();
    if (width == arguments.inputs) return;
    void* rows = room({arguments.count, width});
    table.pack(arguments, embeddings.const_data_ptr(), rows, nullptr);
    arguments.rows = rows;
  }

  std::vector<Part> parts(bool outputs, bool inputs) const {
    const int64_t lanes = table.lanes;
    std::vector<Part> parts;
    const auto add = [&](int64_t count, int64_t most, bool of_inputs) {
      for (int64_t first = 0; first < count; first += most)
        parts.push_back({first, std::min(most, count - first), of_inputs});
    };
    if (outputs) add(arguments.outputs, lanes, false);
    if (inputs) add(arguments.inputs, lanes, true);
    return parts;
  }

  void run(Kernel kernel, const std::vector<Part>& parts, int64_t scratch_length) const {
    const int64_t others = arguments.count * kTaps;
    const auto cost = [&](const Part& part) {
      return part.count * others * (part.inputs ? arguments.outputs : arguments.inputs) / 16;
    };
    run_balanced(parts, cost, [&](const Part* begin, const Part* end) {
      const std::unique_ptr<double[]> scratch(new double[scratch_length]);  // of the widest dtype
      kernel(arguments, begin, end, scratch.get());
    });
  }

  bool by_library() const { return arguments.count > kMostEmbeddings; }

  // The weight as a matrix for the library's product: [C, 9 * O].
  Tensor matrix() const {
    const Tensor rows = shaped(weight, {arguments.outputs, arguments.inputs * kTaps});
    const Tensor turned = torch::stable::contiguous(torch::stable::transpose(rows, 0, 1));
    return shaped(turned, {arguments.inputs, kTaps * arguments.outputs});
  }
};

Tensor forward(Tensor embeddings, Tensor weight) {
  Call call(embeddings, weight);
  Tensor taps = new_tensor(embeddings, {call.arguments.count, kTaps, call.arguments.outputs});
  if (taps.numel() == 0) return taps;
  if (call.by_library()) {
    multiply_into(call.embeddings, call.matrix(), shaped(taps, {call.arguments.count, -1}));
    return taps;
  }
  call.pack_columns();
  call.arguments.taps = taps.mutable_data_ptr();
  call.run(call.table.forward, call.parts(true, false), 0);
  return taps;
}

// The gradients of embeddings and weight, empty if not required.
std::tuple<Tensor, Tensor> backward(Tensor grad, Tensor embeddings, Tensor weight, bool for_embeddings,
                                    bool for_weight) {
  Call call(embeddings, weight);
  Arguments& arguments = call.arguments;
  STD_TORCH_CHECK(grad.dim() == 3 && grad.is_cpu() && grad.size(0) == arguments.count && grad.size(1) == kTaps &&
                      grad.size(2) == arguments.outputs && grad.scalar_type() == embeddings.scalar_type(),
                  "conv3x3_taps_backward: grad must be [N, 9, O] on the CPU, of the dtype of the embeddings");
  Tensor rows = new_tensor(embeddings, {for_embeddings ? arguments.count : 0, arguments.inputs});
  Tensor matrix = new_tensor(embeddings, {for_weight ? arguments.outputs : 0, arguments.inputs, 3, 3});
  if (arguments.count * arguments.inputs * arguments.outputs == 0) {
    torch::stable::zero_(rows);
    torch::stable::zero_(matrix);
    return {rows, matrix};
  }
  const Tensor plain = torch::stable::contiguous(grad);
  if (call.by_library()) {
    const Tensor grads = shaped(plain, {arguments.count, kTaps * arguments.outputs});
    if (for_embeddings) multiply_into(grads, torch::stable::transpose(call.matrix(), 0, 1), rows);
    if (!for_weight) return {rows, matrix};
    const Tensor turned = multiply_transposed(call.embeddings, grads);  // [C, 9 * O]
    Tensor flat = shaped(matrix, {arguments.outputs, -1});
    torch::stable::copy_(flat, torch::stable::transpose(shaped(turned, {-1, arguments.outputs}), 0, 1));
    return {rows, matrix};
  }
  arguments.taps = const_cast<void*>(plain.const_data_ptr());
  arguments.for_rows = rows.mutable_data_ptr();
  arguments.for_weight = matrix.mutable_data_ptr();
  if (for_weight) call.pack_rows();
  call.run(call.table.backward, call.parts(for_weight, for_embeddings),
           call.table.scratch_length(arguments));
  return {rows, matrix};
}

}  // namespace

FASTKD_OP("conv3x3_taps", "(Tensor embeddings, Tensor weight) -> Tensor", forward)
FASTKD_OP("conv3x3_taps_backward",
          "(Tensor grad, Tensor embeddings, Tensor weight, bool for_embeddings, bool for_weight) -> (Tensor, Tensor)",
          backward)

}  // namespace fastkd
#endif  // FASTKD_GENERIC_PASS
