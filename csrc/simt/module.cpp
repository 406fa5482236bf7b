// Python module _simt, the CUDA emulation for tests. Importing it registers the .cu sources' ops as
// torch.ops.fastkd_simt.*.
#include "planted.h"
#include "simt.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

PYBIND11_MODULE(_simt, module) {
  module.doc() = "CUDA's execution model on the CPU, for tests of the kernels";
  module.def(
      "configure",
      [](uint64_t seed, int poison, int64_t shared_bytes) {
        simt::settings() = {seed, static_cast<unsigned char>(poison), shared_bytes};
        simt::forget();
        simt::traffic() = {};
        simt::failure() = {};
      },
      pybind11::arg("seed") = 0, pybind11::arg("poison") = 0xff, pybind11::arg("shared_bytes") = simt::Settings().shared_bytes,
      "Settings of the next launches; forgets the memory of earlier calls.");
  module.def(
      "traffic",
      [] {
        const simt::Traffic& counted = simt::traffic();
        return std::map<std::string, int64_t>{
            {"launches", counted.launches}, {"asked", counted.asked}, {"read", counted.read},
            {"written", counted.written}};
      },
      "Launches since `configure` and the bytes of global memory that they moved: asked for, and each once a launch.");
  module.def(
      "fail_launches", [](bool has_code, const std::string& reason) { simt::failure() = {has_code, reason}; },
      pybind11::arg("has_code"), pybind11::arg("reason"), "Launches fail until the next `configure`.");
  module.def("forget", &simt::forget, "Forgets the memory of earlier calls: their results may be freed.");
  module.def("planted_bugs", &fastkd::planted_bugs, pybind11::arg("for_sanitizer") = false,
             "Name -> kind of finding of every planted bug, or of those that only AddressSanitizer reports.");
  module.def("run_planted", &fastkd::run_planted, pybind11::arg("name"), pybind11::arg("bug"),
             "Runs a planted bug, or its mended form; RuntimeError with what was found.");
}
