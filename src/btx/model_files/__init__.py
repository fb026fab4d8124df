"""Model folders: reading, writing, checking, and which architectures mix into which."""
