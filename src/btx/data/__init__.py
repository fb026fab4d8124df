"""Documents → token files → training sequences."""
