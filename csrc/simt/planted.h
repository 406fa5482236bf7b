#pragma once

#include <map>
#include <string>

namespace fastkd {
// Name -> the kind of finding that must be reported, or the report of AddressSanitizer.
std::map<std::string, std::string> planted_bugs(bool for_sanitizer);
void run_planted(const std::string& name, bool bug);
}  // namespace fastkd
