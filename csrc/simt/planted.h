#pragma once

#include <map>
#include <string>

namespace fastkd {
std::map<std::string, std::string> planted_bugs();  // name -> the kind of finding it must lead to
void run_planted(const std::string& name, bool bug);
}  // namespace fastkd
