"""What the ops share: argument checks, dispatch to a backend, coverage of boxes, memory layouts."""
