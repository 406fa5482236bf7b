"""Seeds x methods on generated data."""
