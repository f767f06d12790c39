"""The recipe of the embedded model that understands hints; see README.md."""
