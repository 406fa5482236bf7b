"""Code shared by the ops: argument checks, backend dispatch, box coverage, memory layouts."""
