#pragma once

#include <map>
#include <string>

namespace fastkd {
// Name -> the kind of finding it must lead to, or what AddressSanitizer must report.
std::map<std::string, std::string> planted_bugs(bool for_sanitizer);
void run_planted(const std::string& name, bool bug);
}  // namespace fastkd
