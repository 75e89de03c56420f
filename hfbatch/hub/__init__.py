"""Model folders: pins a name to a commit, downloads and inspects files. Loads no weights."""
