"""Training study on generated data: seeds x methods."""
