"""Prints what the project needs, read from pyproject.toml: build system, run time and the extras named as arguments.

After `--only` the extras alone.
"""

import sys

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)
extras = sys.argv[1:]
wanted = project["build-system"]["requires"] + project["project"]["dependencies"]
if extras[:1] == ["--only"]:
    wanted, extras = [], extras[1:]
for extra in extras:
    wanted += project["project"]["optional-dependencies"][extra]
print("\n".join(dict.fromkeys(wanted)))
